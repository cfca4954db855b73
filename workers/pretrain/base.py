"""Trains the small base checkpoints of this repository, each from its recipe, by one command.

`python -m workers.pretrain configs/models/tiny-clip/recipe.yaml --out DIR` draws altered copies of the sets in the recipe, trains
on them with the training loop of experts until the recipe's rule ends it (`workers.pretrain.recipe`), and writes the weights
directory, `scores.json` and a page with the scores to DIR.

Invariant: training uses only training splits, of the pretraining role (`pool`) and of held-out sets outside it (`base_only`); the
rule reads only validation splits.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE, Checkpoint, CheckpointWriter
from merge_service.errors import UserError
from workers.data.manifest import DatasetInfo, describe, read_suite, split_of
from workers.data.writer import write_dataset
from workers.jobs import EngineSpec, EvaluateJob, Source, TrainJob
from workers.pretrain.page import page
from workers.pretrain.recipe import Pretraining, best, ended, read_settings
from workers.training.checkpoints import Checkpoints, LoopState

TOKEN_TABLE = "token_embedding.weight"


def pretrain(
    recipe_file: Path, out: Path, root: str | None = None, seed: int | None = None
) -> dict[str, Any]:
    """Make the base of `recipe_file` in `out`. A call after a crash continues from the last check.

    `root` and `seed` replace those of the recipe. Returns the content of `out/scores.json`: "scores" ({dataset: fraction} on test
    splits), "chance" of them, "val_scores" (of held-out sets), "weights", "checks" ([[step, mean score]]), "kept" (a step),
    "train", ... Raises UserError for a bad recipe, a missing suite or split, or a set that may not be trained on.
    """
    settings = read_settings(recipe_file)
    given = {"root": root, "seed": seed}
    settings = settings.model_copy(update={key: value for key, value in given.items() if value is not None})
    roles = read_suite(settings.root)["roles"]
    work = out / f"work-{_digest(settings, recipe_file.parent / CONFIG_FILE)}"
    _admit(recipe_file, settings, roles, work / "cache")
    work.mkdir(parents=True, exist_ok=True)
    training = _Training(settings, recipe_file.parent, work, roles["held_out"])
    trained = training.run()
    shutil.copytree(training.kept, out, dirs_exist_ok=True)
    datasets = list(dict.fromkeys([*roles["held_out"], *roles["adaptation"]]))
    test = evaluate_base(out, settings.root, datasets, "test", work / "cache")
    val = evaluate_base(out, settings.root, roles["held_out"], "val", work / "cache")
    result = {
        "seed": settings.seed, "roles": roles, **test, "val_scores": val["scores"], "weights": count_weights(out),
        **training.record(), "train": trained,
    }  # fmt: skip
    (out / "scores.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "README.md").write_text(page(recipe_file, settings, result), encoding="utf-8")
    shutil.rmtree(work)
    return result


def write_pool(settings: Pretraining, pool: Path, cache: Path) -> list[Source]:
    """Write the altered copies as datasets under `pool`; returns their training splits. Raises UserError for an unknown change."""
    from workers.data.decode import load
    from workers.data.variants import variants

    sources, size = [], int(read_suite(settings.root).get("image_size", 32))
    for number, (name, wanted) in enumerate(settings.taught.items()):
        source, home = Source(str(pool), name, "train"), pool / name
        sources.append(source)
        if (home / "manifest.json").is_file():
            continue
        shutil.rmtree(home, ignore_errors=True)
        samples = load(Source(settings.root, name, "train"), size, cache)
        copies = variants(samples, wanted.copies, wanted.changes, settings.seed, number)
        write_dataset(
            home,
            kind=samples.kind,
            classes=samples.classes,
            templates=samples.templates,
            splits={"train": copies},
        )
        print(f"pool: {name}, {len(samples)} images x {wanted.copies}", flush=True)
    return sources


def store_weights(trained: Path, out: Path, storage: str) -> None:
    """Copy a weights directory with its floats rounded to `storage` (fp16 halves the file; open_clip reads either)."""
    with Checkpoint.open(trained / WEIGHTS_FILE) as checkpoint:
        kinds = {
            name: ("F16" if info.kind.is_float and storage == "fp16" else info.dtype)
            for name, info in checkpoint.tensors.items()
        }
        layout = {name: (kinds[name], info.shape) for name, info in checkpoint.tensors.items()}
        with CheckpointWriter(out / WEIGHTS_FILE, layout) as writer:
            for name in checkpoint.tensors:
                writer.write(name, 0, checkpoint.read(name))
    shutil.copyfile(trained / CONFIG_FILE, out / CONFIG_FILE)


def evaluate_base(model: Path, root: str, datasets: Sequence[str], split: str, cache: Path) -> dict[str, Any]:
    """{"scores", "chance", "samples"} by dataset: zero-shot scores of a weights directory on one split, chance levels, sample counts."""
    from workers.scoring.evaluate import evaluate

    job = EvaluateJob(
        fingerprint="pretrain", label="base", model=str(model), cache=str(cache),
        datasets=tuple(Source(root, name, split) for name in datasets),
    )  # fmt: skip
    found = evaluate(job)
    infos = {name: describe(root, name, cache) for name in datasets}
    chance = {name: round(chance_level(info, split), 4) for name, info in infos.items()}
    scores = {name: round(score, 4) for name, score in found["scores"].items()}
    return {"scores": scores, "chance": chance, "samples": found["samples"]}


def chance_level(info: DatasetInfo, split: str) -> float:
    """The score of random guessing: 1 / classes; for retrieval 5 / images (recall@5 with one caption per image)."""
    return (
        1 / len(info.classes) if info.kind == "classification" else min(1.0, 5 / info.splits[split].samples)
    )


def count_weights(model: Path) -> dict[str, int]:
    """The number of weights in a weights directory, in all and in its token table."""
    with Checkpoint.open(model / WEIGHTS_FILE) as checkpoint:
        sizes = {name: math.prod(info.shape) for name, info in checkpoint.tensors.items()}
    return {"all": sum(sizes.values()), "token_table": sizes.get(TOKEN_TABLE, 0)}


class _Ended(Exception):
    """Raised when the rule ends the training."""


class _Training:
    """Random weights, then the training loop of experts with a check after every `stop.every` steps.

    A check scores the weights as they would be stored, and keeps them if they are the best so far. Checks are on disk before
    the next checkpoint, so a run that was stopped anywhere ends with the same weights as one that was not.
    """

    def __init__(self, settings: Pretraining, config: Path, work: Path, held_out: Sequence[str]) -> None:
        self._settings, self._config, self._work, self._held_out = settings, config, work, tuple(held_out)
        self.kept, self._file = work / "kept", work / "checks.json"
        self._checks: list[tuple[int, float]] = []
        self._seconds = -time.process_time()
        if self._file.is_file():
            known = json.loads(self._file.read_text(encoding="utf-8"))
            self._checks = [(step, score) for step, score in known["checks"]]
            self._seconds += known["seconds"]

    def run(self) -> dict[str, Any]:
        """Train until the rule or the steps end it; returns steps, images, images per second and the loss curve."""
        from workers.models.model import export_base
        from workers.training.expert import train_expert

        settings, work, rule = self._settings, self._work, self._settings.stop
        initial, trained = work / "initial", work / "trained"
        trained.mkdir(exist_ok=True)
        export_base(str(self._config / CONFIG_FILE), None, initial, settings.seed)
        sources = write_pool(settings, work / "pool", work / "cache")
        job = TrainJob(
            fingerprint=work.name, label="base", t=0, task="pretraining", init=str(initial), base=str(initial), update=tuple(sources),
            buffer=(), pretraining=(), recipe=settings.recipe.model_dump(), steps=rule.steps, seed=settings.seed, engine=EngineSpec(),
            scratch=str(work / "scratch"), checkpoint_every=rule.every, out=str(trained), cache=str(work / "cache"),
        )  # fmt: skip
        print(f"training: at most {rule.steps} steps of {settings.recipe.batch_size}", flush=True)
        try:
            found = train_expert(
                job, hooks={"train.start": self._look_again, "train.after_ckpt": self._look_again}
            )
            curve, seconds = found["loss"], found["seconds"]
            self._look(rule.steps, trained)
        except _Ended:
            _, loop = self._checkpoint(self._checks[-1][0])
            curve, seconds = loop["curve"], loop["seconds"]
        steps = self._checks[-1][0]
        samples = steps * settings.recipe.batch_size
        return {
            "steps": steps,
            "samples": samples,
            "samples_per_second": round(samples / seconds),
            "loss": curve[:: max(1, len(curve) // 20)],
        }

    def record(self) -> dict[str, Any]:
        """The checks, the step of the kept one, and the minutes of one core so far."""
        steps, scores = zip(*self._checks, strict=True)
        minutes = round((self._seconds + time.process_time()) / 60, 1)
        return {"checks": self._checks, "kept": steps[best(scores)], "minutes": minutes}

    def _look_again(self, step: int) -> None:
        """Hook of the training loop: check a checkpoint. It also runs at the start, for a checkpoint that was written but not checked."""
        from safetensors.torch import load_file

        from workers.models.model import save

        if step and step not in dict(self._checks):
            directory, _ = self._checkpoint(step)
            tensors = load_file(directory / "engine.safetensors")
            state = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")}
            now = self._work / "now"
            now.mkdir(exist_ok=True)
            save(state, self._work / "initial", now)
            self._look(step, now)
        steps, scores = list(dict(self._checks)), list(dict(self._checks).values())
        if steps and step == steps[-1] and ended(scores, self._settings.stop):
            raise _Ended

    def _look(self, step: int, weights: Path) -> None:
        if step in dict(self._checks):
            return
        seen = self._work / "seen"
        seen.mkdir(exist_ok=True)
        store_weights(weights, seen, self._settings.storage)
        found = evaluate_base(seen, self._settings.root, self._held_out, "val", self._work / "cache")[
            "scores"
        ]
        mean = round(math.fsum(found.values()) / len(found), 4)
        self._checks.append((step, mean))
        if best([score for _, score in self._checks]) == len(self._checks) - 1:
            shutil.copytree(seen, self.kept, dirs_exist_ok=True)
        noted = {"checks": self._checks, "seconds": self._seconds + time.process_time()}
        temporary = self._file.with_suffix(".partial")
        temporary.write_text(json.dumps(noted), encoding="utf-8")
        temporary.replace(self._file)
        print(f"check: step {step}, mean {mean:.4f}, {found}", flush=True)

    def _checkpoint(self, step: int) -> tuple[Path, LoopState]:
        return Checkpoints(self._work / "scratch", self._work.name).judged(step)


def _admit(recipe_file: Path, settings: Pretraining, roles: Mapping[str, Sequence[str]], cache: Path) -> None:
    """Raise UserError for sets that may not be trained on, and for sets without a required split."""
    strangers = sorted(settings.pool.keys() - set(roles["pretraining"]))
    if strangers:
        raise UserError(
            f"{recipe_file}: pool names {', '.join(strangers)}, which are not in the pretraining role of {settings.root}"
        )
    allowed = set(roles["held_out"]) - set(roles["pretraining"]) - set(roles["adaptation"])
    strangers = sorted(settings.base_only.keys() - allowed)
    if strangers:
        raise UserError(
            f"{recipe_file}: base_only names {', '.join(strangers)}; it may name held-out sets that experts never replay: "
            f"{', '.join(sorted(allowed)) or 'there are none'}"
        )
    for split, names in (("train", settings.taught), ("val", dict.fromkeys(roles["held_out"]))):
        for name in names:
            split_of(describe(settings.root, name, cache), split)


def _digest(settings: Pretraining, config: Path) -> str:
    return hashlib.sha256(settings.model_dump_json().encode() + config.read_bytes()).hexdigest()[:12]
