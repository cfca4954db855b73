"""Making the small base checkpoint that ships with the repository, from its recipe, by one command.

`python -m workers.pretrain configs/models/tiny-clip/recipe.yaml --out DIR` draws altered copies of the pretraining pool, trains on
them with the very loop that trains experts, and leaves in DIR the weights directory, `scores.json` and a README that states the
scores. Invariant: nothing but the training splits of the pretraining role is ever trained on.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from merge_service.checkpoint import CONFIG_FILE, WEIGHTS_FILE, Checkpoint, CheckpointWriter
from merge_service.errors import UserError
from workers.data.manifest import DatasetInfo, describe, read_suite
from workers.data.writer import write_dataset
from workers.jobs import EngineSpec, EvaluateJob, Source, TrainJob
from workers.training.recipe import Recipe


class Copies(BaseModel):
    """How often each image of a dataset enters the pool, and what may happen to it (see `workers.data.variants`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    copies: int = Field(ge=1, le=1000)
    changes: tuple[str, ...] = ()


class Pretraining(BaseModel):
    """A pretraining recipe: `recipe.yaml` beside the `open_clip_config.json` of the model it makes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    root: str = "data/mini"
    pool: dict[str, Copies]
    recipe: Recipe
    steps: int = Field(ge=1)
    seed: int = Field(default=0, ge=0)
    storage: Literal["fp32", "fp16"] = "fp32"


def pretrain(recipe_file: Path, out: Path, root: str | None = None) -> dict[str, Any]:
    """Make the base of `recipe_file` in `out`; run again after a crash, it goes on from its last checkpoint.

    `root` replaces the recipe's data root. Returns {"scores": {dataset: fraction}, "chance": {...}, "train": {...}, ...}, which is
    also written to `out/scores.json`. Raises UserError for a bad recipe, a missing suite, or a pool outside the pretraining role.
    """
    settings, started = read_settings(recipe_file), time.monotonic()
    root = root or settings.root
    roles = read_suite(root)["roles"]
    strangers = set(settings.pool) - set(roles["pretraining"])
    if strangers:
        raise UserError(
            f"{recipe_file}: pool names {', '.join(sorted(strangers))}, which are not in the pretraining role of {root}"
        )
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    trained = _train(settings, recipe_file.parent, root, work)
    store_weights(work / "trained", out, settings.storage)
    datasets = list(dict.fromkeys([*roles["held_out"], *roles["adaptation"]]))
    result = {"roles": roles, **evaluate_base(out, root, datasets, work), "train": trained}
    result["minutes"] = round((time.monotonic() - started) / 60, 1)
    (out / "scores.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "README.md").write_text(readme(recipe_file, settings, result), encoding="utf-8")
    shutil.rmtree(work)
    return result


def read_settings(recipe_file: Path) -> Pretraining:
    """Read and check a recipe. Raises UserError naming the keys that are wrong."""
    try:
        return Pretraining.model_validate(yaml.safe_load(recipe_file.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{recipe_file} cannot be read: {error}") from None
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors()
        )
        raise UserError(f"{recipe_file}: {wrong}") from None


def write_pool(settings: Pretraining, root: str, pool: Path, cache: Path) -> list[Source]:
    """Write the altered copies as datasets under `pool` and return their training splits."""
    from workers.data.decode import load
    from workers.data.variants import variants

    sources = []
    for number, (name, wanted) in enumerate(settings.pool.items()):
        source, home = Source(str(pool), name, "train"), pool / name
        sources.append(source)
        if (home / "manifest.json").is_file():
            continue
        shutil.rmtree(home, ignore_errors=True)
        samples = load(Source(root, name, "train"), _image_size(root), cache)
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
    """Copy a weights directory, its floats rounded to `storage` (fp16 halves the file; open_clip reads either)."""
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


def evaluate_base(model: Path, root: str, datasets: Sequence[str], work: Path) -> dict[str, Any]:
    """Zero-shot scores of a weights directory on the test splits, beside what guessing scores."""
    from workers.scoring.evaluate import evaluate

    job = EvaluateJob(
        fingerprint="pretrain", label="base", model=str(model), scratch=str(work), cache=str(work / "cache"),
        datasets=tuple(Source(root, name, "test") for name in datasets),
    )  # fmt: skip
    found = evaluate(job)
    infos = {name: describe(root, name, work / "cache") for name in datasets}
    chance = {name: round(chance_level(info), 4) for name, info in infos.items()}
    scores = {name: round(score, 4) for name, score in found["scores"].items()}
    return {"scores": scores, "chance": chance, "samples": found["samples"]}


def chance_level(info: DatasetInfo) -> float:
    """What guessing scores: 1 / classes; for retrieval 5 / images (recall@5 with one caption an image)."""
    return (
        1 / len(info.classes) if info.kind == "classification" else min(1.0, 5 / info.splits["test"].samples)
    )


def _train(settings: Pretraining, config: Path, root: str, work: Path) -> dict[str, Any]:
    """Random weights, then the loop of the experts; returns its loss curve and speed."""
    from workers.models.model import export_base
    from workers.training.expert import train_expert

    initial, trained = work / "initial", work / "trained"
    trained.mkdir(exist_ok=True)
    export_base(str(config / CONFIG_FILE), None, initial, settings.seed)
    sources = write_pool(settings, root, work / "pool", work / "cache")
    job = TrainJob(
        fingerprint="pretrain", label="base", t=0, task="pretraining", init=str(initial), base=str(initial), update=tuple(sources),
        buffer=(), pretraining=(), recipe=settings.recipe.model_dump(), steps=settings.steps, seed=settings.seed, engine=EngineSpec(),
        scratch=str(work / "scratch"), checkpoint_every=200, out=str(trained), cache=str(work / "cache"),
    )  # fmt: skip
    print(
        f"training: {settings.steps} steps of {settings.recipe.batch_size}; progress in {work / 'scratch'}",
        flush=True,
    )
    result = train_expert(job)
    curve = result["loss"][:: max(1, len(result["loss"]) // 20)]
    return {
        "steps": result["steps"],
        "samples": result["samples"],
        "samples_per_second": round(result["samples_per_second"]),
        "loss": curve,
    }


def _image_size(root: str) -> int:
    return int(read_suite(root).get("image_size", 32))


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 2 on a UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m workers.pretrain", description="Make a base checkpoint from its recipe."
    )
    parser.add_argument("recipe", type=Path, help="recipe.yaml beside an open_clip_config.json")
    parser.add_argument(
        "--out", type=Path, required=True, help="where to write the weights directory and its scores"
    )
    parser.add_argument("--root", help="the suite to train on (default: what the recipe says)")
    options = parser.parse_args(arguments)
    try:
        result = pretrain(options.recipe, options.out, options.root)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    return 0


def readme(recipe_file: Path, settings: Pretraining, result: dict[str, Any]) -> str:
    """What stands beside the weights: how they were made and what they score."""
    pool, train = (
        ", ".join(f"{name} x{copies.copies}" for name, copies in settings.pool.items()),
        result["train"],
    )
    return f"""# {recipe_file.resolve().parent.name}: the base checkpoint of the mini suite

Written by `python -m workers.pretrain {recipe_file} --out DIR`, weights, `scores.json` and this page alike; the same command makes
it again (equal bytes on an equal machine). It opens with `open_clip.create_model_and_transforms("local-dir:DIR")`.

Trained on the training splits of the pretraining role and nothing else (copies of each image: {pool}), {train["steps"]} steps of
{settings.recipe.batch_size}, {train["samples"]:,} images, seed {settings.seed}; stored in {settings.storage}. Zero-shot scores on whole test splits, top-1
accuracy or, for retrieval, recall@5 as the mean of both directions. The held-out tests share concepts with what was taught and none
of its pictures; the adaptation datasets are the tasks of the stream, of which a base need not know anything.

{table(result)}

`icons` is tested in two drawing weights that were never taught, `digits8` on digits of other hands at 8x8 pixels, `emoji_names` on
emoji never seen, `mnist` on unseen digits, `photos_a` on the right third of photographs whose left part was taught.
"""


def table(result: dict[str, Any]) -> str:
    """The scores as a Markdown table, held-out datasets first."""
    lines = ["| role | dataset | test images | zero-shot | chance |", "|---|---|---|---|---|"]
    for role in ("held_out", "adaptation"):
        for name in result["roles"][role]:
            numbers = (
                f"{result['samples'][name]} | {result['scores'][name]:.3f} | {result['chance'][name]:.3f}"
            )
            lines.append(f"| {role.replace('_', '-')} | {name} | {numbers} |")
        mean = sum(result["scores"][name] for name in result["roles"][role]) / len(result["roles"][role])
        lines.append(f"| {role.replace('_', '-')} | **mean** | | **{mean:.3f}** | |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
