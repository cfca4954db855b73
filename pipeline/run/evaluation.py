"""Scores one checkpoint from the command line exactly as a run does: the same data and functions, without a cluster."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import NotRequired, TypedDict, cast

from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE, Checkpoint, CheckpointWriter, locate
from merge_service.errors import UserError
from pipeline.errors import PlanError
from pipeline.plan.facts import base_for_now, base_of, cache_of, ensure_data, stated
from pipeline.plan.prompt_notes import prompt_notes
from pipeline.plan.steps import SPLITS, VAL, without_val
from pipeline.results.over_time import gm, ka, zs, zs_of_groups
from pipeline.study.config import Study, study_from
from workers.data.manifest import describe, verify
from workers.data.seen import notes
from workers.jobs import EvaluateJob, EvaluateResult, Source
from workers.models.base import Base, find
from workers.models.base import describe as described
from workers.models.configuration import is_tokenizer_file, unknown_model
from workers.scoring.details import DETAILS


class _OfGroups(TypedDict, total=False):
    zs_replayed: float | None
    zs_never_replayed: float | None


class Evaluated(_OfGroups):
    """Scores in [0, 1] of a checkpoint and the number of samples, by dataset; its preprocessing; notes.

    KA, ZS, GM and ZS by group are present if all datasets of the study were scored.
    """

    checkpoint: str
    split: str
    scores: dict[str, float]
    samples: dict[str, int]
    preprocess: Mapping[str, object]
    preprocess_from: str
    activation: str
    notes: list[str]
    details: NotRequired[Mapping[str, object]]
    ka: NotRequired[float | None]
    zs: NotRequired[float | None]
    gm: NotRequired[float | None]


def study_of_root(root: Path, checkpoint: Path, model: str | None, overrides: Sequence[str] = ()) -> Study:
    """A study that scores every dataset of a root, for a checkpoint that belongs to no study.

    Its model is the configuration beside the checkpoint, else `model`. Raises UserError for a root without datasets, and for a
    file whose model is not known.
    """
    if not root.is_dir():
        raise UserError(f"--root {root} does not exist; give a folder of datasets")
    names = sorted(path.parent.parent.name.removeprefix("wds_") for path in root.glob("*/*/nshards.txt"))
    names += [path.parent.parent.name.removeprefix("wds_") for path in root.glob("*/*/*.tar")]
    if not names:
        raise UserError(
            f"--root {root} holds no datasets; expected folders such as {root / 'NAME' / 'test'} with *.tar shards"
        )
    home = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if model is None and not (home / CONFIG_FILE).is_file():
        locate(checkpoint)
        raise unknown_model(checkpoint)
    tree = {
        "name": "evaluate",
        "model": {"config": model or str(home)},
        "data": {"root": str(root), "adaptation": sorted(set(names)), "held_out": [], "pretraining": []},
        "budget": {"steps_per_task": 1},
        "grid": {"strategies": ["zero_shot"]},
    }
    return study_from(tree, "evaluate", overrides)


def with_split(study: Study, split: str | None) -> list[str]:
    """The datasets of a study's root that have the split to score. Raises UserError if there is none."""
    wanted = split or study.evaluation.split
    names = study.data.adaptation or ()
    found = [name for name in names if wanted in describe(study.data_root, name, cache_of(study)).splits]
    if not found:
        raise UserError(
            f"--root {study.data_root}: no dataset has a {wanted} split; there are {', '.join(names)}"
        )
    return found


def score(
    checkpoint: Path,
    study: Study,
    names: Sequence[str] | None,
    split: str | None = None,
    details: Sequence[str] | None = None,
) -> Evaluated:
    """The scores of a checkpoint on the datasets `names`, or on all of the study's, with KA, ZS and GM; `details` if requested.

    `split` (test or val) and `details` override the study's. A file without a configuration beside it is read with that of the
    study's base. Raises UserError.
    """
    if split not in (None, *SPLITS):
        raise UserError(f"--split {split}: there is no such split; choose {' or '.join(SPLITS)}")
    unknown = [name for name in details or () if name not in DETAILS]
    if unknown:
        raise UserError(
            f"--details {unknown[0]}: there is no such detail; choose of {', '.join(DETAILS)}, or all"
        )
    stated = {"split": split, "details": None if details is None else tuple(details)}
    options = study.evaluation.model_copy(
        update={key: value for key, value in stated.items() if value is not None}
    )
    study = study.model_copy(update={"evaluation": options})
    ensure_data(study)
    study = study.resolved()
    known = dict.fromkeys((*study.roles.adaptation, *study.roles.held_out))
    strangers = [name for name in names or () if name not in known]
    if strangers:
        raise UserError(
            f"--datasets: the study does not score {', '.join(strangers)}; it scores {', '.join(known)}"
        )
    _check_split(study, names or list(known))
    with tempfile.TemporaryDirectory() as room, named_as_given(Path(room), checkpoint):
        model, base = weights_directory(checkpoint, study, Path(room))
        worth_knowing = _notes(model, study, names or list(known))
        found = _evaluate(model, study, names or list(known))
        answer: Evaluated = {
            "checkpoint": str(checkpoint), "split": study.evaluation.split, "scores": found["scores"],
            "samples": found["samples"], "preprocess": base.preprocess, "preprocess_from": base.preprocess_from,
            "activation": base.activation, "notes": [*_seen_otherwise(base, study), *worth_knowing],
        }  # fmt: skip
    if "details" in found:
        answer["details"] = found["details"]
    if names is None:
        answer["ka"], answer["zs"] = (
            ka(answer["scores"], study.roles.adaptation),
            zs(answer["scores"], study.roles.held_out),
        )
        answer["gm"] = gm(answer["ka"], answer["zs"])
        answer.update(cast(_OfGroups, zs_of_groups(answer["scores"], study.zero_shot_groups)))
    answer["notes"] = [note.replace(room, str(checkpoint)) for note in answer["notes"]]
    return answer


def _check_split(study: Study, names: Sequence[str]) -> None:
    """Raise PlanError, as `plan` does, for datasets that have no val split if val is scored."""
    if study.evaluation.split == VAL:
        splits = {name: describe(study.data_root, name, cache_of(study)).splits for name in names}
        if lacking := [name for name in names if VAL not in splits[name]]:
            raise PlanError(without_val(lacking, study.data_root))


def _seen_otherwise(base: Base, study: Study) -> list[str]:
    """Notes on the preprocessing: those of the base, and differences from the study's base."""
    found, (ours, _) = list(base.notes), base_for_now(study.model)
    if ours is not None:
        for what, mine, other in (
            ("preprocessing", described(base.preprocess), described(ours.preprocess)),
            ("activation", base.activation, ours.activation),
        ):
            if mine != other:
                found.append(
                    f"{what}: {mine} (from {base.preprocess_from}), while the study's base has {other}"
                )
    return found


def _notes(model: Path, study: Study, names: Sequence[str]) -> list[str]:
    """Notes on the scored splits that affect how far their scores can be trusted. Raises ShardError."""
    root, cache, found = study.data_root, cache_of(study), list[str]()
    split = study.evaluation.split
    for name in names:
        info = describe(root, name, cache)
        if split in info.splits:
            found += notes(info, {split: verify(root, name, split, cache)})
    return [*found, *prompt_notes(model, root, names, cache)]


def _evaluate(model: Path, study: Study, names: Sequence[str]) -> EvaluateResult:
    from workers.scoring.evaluate import evaluate

    root, options, resources = (
        str(Path(study.data_root).absolute()),
        study.evaluation,
        study.resources.of(study.model.config),
    )
    job = EvaluateJob(
        fingerprint="",
        label=str(model),
        model=str(model),
        datasets=tuple(Source(root, name, options.split, reading=study.data.reading) for name in names),
        fraction=options.fraction,
        seed=options.seed,
        batch_size=options.batch_size,
        threads=resources.evaluation.threads or 1,
        device=resources.evaluation_device,
        cache=str(cache_of(study).absolute()),
        details=tuple(options.details),
        precision=options.precision_on(resources.evaluation_device),
    )
    return evaluate(job)


def _one_file(weights: Path, file: Path) -> None:
    """Link or write the checkpoint under the file name of a weights directory; shards are joined."""
    if weights.suffix == ".safetensors":
        file.symlink_to(weights.absolute())
        return
    with Checkpoint.open(weights) as checkpoint:
        layout = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
        with CheckpointWriter(file, layout, checkpoint.metadata) as writer:
            for name in layout:
                writer.write(name, 0, checkpoint.read(name))


@contextmanager
def named_as_given(room: Path, checkpoint: Path) -> Iterator[None]:
    """In messages of user errors, name the given checkpoint instead of the temporary directory."""
    try:
        yield
    except UserError as error:
        names = {str(room / WEIGHTS_FILE): str(checkpoint), f" ({room})": "", str(room): str(checkpoint)}
        text = reduce(lambda message, pair: message.replace(*pair), names.items(), str(error))
        if text == str(error):
            raise
        raise UserError(text) from error


def weights_directory(checkpoint: Path, study: Study, room: Path) -> tuple[Path, Base]:
    """The checkpoint as a weights directory, and its base.

    Its configuration is the one beside it, else that of the study's base; `model.preprocess` overrides both.
    """
    weights, asked = locate(checkpoint), stated(study.model)
    beside = checkpoint if checkpoint.is_dir() else checkpoint.parent
    home: Path | None = beside
    if (beside / CONFIG_FILE).is_file():
        base = find(str(beside), None, asked)
        if checkpoint.is_dir() and base.usual and weights.name == WEIGHTS_FILE:
            return checkpoint, base
    else:
        base = base_of(study.model)
        home = base.tokenizer_home
    for path in home.iterdir() if home is not None else ():
        if is_tokenizer_file(path):
            (room / path.name).symlink_to(path.absolute())
    _one_file(weights, room / WEIGHTS_FILE)
    (room / CONFIG_FILE).write_text(json.dumps(base.configuration), encoding="utf-8")
    return room, base
