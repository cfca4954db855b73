"""Score one checkpoint from the command line exactly as a run scores it: same data, same functions, no cluster."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

from merge_service.checkpoint import CONFIG_FILE, WEIGHTS_FILE, Checkpoint, CheckpointWriter, locate
from merge_service.errors import UserError
from pipeline.config import Study, load_study
from pipeline.errors import PlanError
from pipeline.facts import base_for_now, base_of, cache_of, ensure_data, stated
from pipeline.prompt_notes import prompt_notes
from pipeline.results import gm, ka, zs, zs_of_groups
from pipeline.steps import SPLITS, VAL, without_val
from workers.base import Base, find
from workers.base import describe as described
from workers.configuration import is_tokenizer_file
from workers.data.manifest import describe, verify
from workers.data.seen import notes
from workers.jobs import EvaluateJob, Source


def evaluate_checkpoint(
    checkpoint: Path,
    study_path: Path,
    overrides: Sequence[str],
    names: Sequence[str] | None,
    split: str | None = None,
) -> dict[str, Any]:
    """{"checkpoint", "split", "scores": {dataset: fraction}, "samples", "preprocess", "preprocess_from", "activation", "notes",
    "ka", "zs", "gm", "zs_replayed", "zs_never_replayed"}; the last five only without `names`.

    A file without a configuration beside it is read with that of the study's base. Raises UserError.
    """
    return score(checkpoint, load_study(study_path, overrides), names, split)


def score(
    checkpoint: Path, study: Study, names: Sequence[str] | None, split: str | None = None
) -> dict[str, Any]:
    """The same for a study that has been read; `split` (test or val) comes before the study's."""
    if split not in (None, *SPLITS):
        raise UserError(f"--split {split}: there is no such split; choose {' or '.join(SPLITS)}")
    if split is not None:
        study = study.model_copy(update={"evaluation": study.evaluation.model_copy(update={"split": split})})
    ensure_data(study)
    study = study.resolved()
    known = dict.fromkeys((*study.roles.adaptation, *study.roles.held_out))
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise UserError(
            f"--datasets: the study does not score {', '.join(unknown)}; it scores {', '.join(known)}"
        )
    _check_split(study, names or list(known))
    with tempfile.TemporaryDirectory() as room, _named(Path(room), checkpoint):
        model, base = _weights_directory(checkpoint, study, Path(room))
        worth_knowing = _notes(model, study, names or list(known))
        answer = _evaluate(model, study, names or list(known)) | _said(base, study)
        answer["notes"] += worth_knowing
    if names is None:
        answer["ka"], answer["zs"] = (
            ka(answer["scores"], study.roles.adaptation),
            zs(answer["scores"], study.roles.held_out),
        )
        answer["gm"] = gm(answer["ka"], answer["zs"])
        answer |= zs_of_groups(answer["scores"], study.zero_shot_groups)
    answer["notes"] = [note.replace(room, str(checkpoint)) for note in answer["notes"]]
    return {"checkpoint": str(checkpoint), "split": study.evaluation.split, **answer}


def _check_split(study: Study, names: Sequence[str]) -> None:
    """Raise PlanError, as `plan` does, for sets that are to be scored on val and have none."""
    if study.evaluation.split == VAL:
        splits = {name: describe(study.data_root, name, cache_of(study)).splits for name in names}
        if lacking := [name for name in names if VAL not in splits[name]]:
            raise PlanError(without_val(lacking, study.data_root))


def _said(base: Base, study: Study) -> dict[str, Any]:
    """How the pixels became input, for the answer, and what is worth a note: a study's base that is seen in another way."""
    said, (ours, _) = list(base.notes), base_for_now(study.model)
    if ours is not None:
        for what, mine, other in (
            ("preprocessing", described(base.preprocess), described(ours.preprocess)),
            ("activation", base.activation, ours.activation),
        ):
            if mine != other:
                said.append(
                    f"{what}: {mine} (from {base.preprocess_from}), while the study's base has {other}"
                )
    return {
        "preprocess": base.preprocess, "preprocess_from": base.preprocess_from, "activation": base.activation,
        "notes": said,
    }  # fmt: skip


def _notes(model: Path, study: Study, names: Sequence[str]) -> list[str]:
    """What to know of the splits that are scored before their scores are believed. Raises ShardError."""
    root, cache, said = study.data_root, cache_of(study), list[str]()
    split = study.evaluation.split
    for name in names:
        info = describe(root, name, cache)
        if split in info.splits:
            said += notes(info, {split: verify(root, name, split, cache)})
    return [*said, *prompt_notes(model, root, names, cache)]


def _evaluate(model: Path, study: Study, names: Sequence[str]) -> dict[str, Any]:
    from workers.evaluate import evaluate

    root, options, resources = (
        str(Path(study.data_root).absolute()),
        study.evaluation,
        study.resources.of(study.model.config),
    )
    job = EvaluateJob(
        fingerprint="",
        label=str(model),
        model=str(model),
        datasets=tuple(Source(root, name, options.split) for name in names),
        fraction=options.fraction,
        seed=options.seed,
        batch_size=options.batch_size,
        threads=resources.evaluation.threads or 1,
        device=resources.evaluation_device,
        cache=str(cache_of(study).absolute()),
    )
    answer = evaluate(job)
    return {"scores": answer["scores"], "samples": answer["samples"]}


def _one_file(weights: Path, file: Path) -> None:
    """The checkpoint under the name that a weights directory wants; shards are put together."""
    if weights.suffix == ".safetensors":
        file.symlink_to(weights.absolute())
        return
    with Checkpoint.open(weights) as checkpoint:
        layout = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
        with CheckpointWriter(file, layout, checkpoint.metadata) as writer:
            for name in layout:
                writer.write(name, 0, checkpoint.read(name))


@contextmanager
def _named(room: Path, checkpoint: Path) -> Iterator[None]:
    """A user's mistake is said of the checkpoint that was given, not of the room in which it was laid out."""
    try:
        yield
    except UserError as error:
        names = {str(room / WEIGHTS_FILE): str(checkpoint), f" ({room})": "", str(room): str(checkpoint)}
        text = reduce(lambda said, pair: said.replace(*pair), names.items(), str(error))
        if text == str(error):
            raise
        raise UserError(text) from error


def _weights_directory(checkpoint: Path, study: Study, room: Path) -> tuple[Path, Base]:
    """The checkpoint as a weights directory, and what is known of it.

    Its configuration is the one beside it, else that of the study's base; `model.preprocess` comes before either.
    """
    weights, asked = locate(checkpoint), stated(study.model)
    beside = checkpoint if checkpoint.is_dir() else checkpoint.parent
    home: Path | None = beside
    if (beside / CONFIG_FILE).is_file():
        base = find(str(beside), None, asked)
        if checkpoint.is_dir() and base.usual and weights.name == WEIGHTS_FILE:
            return checkpoint, base
    else:
        lent = base_of(study.model)
        base, home = lent, lent.tokenizer_home
    for path in home.iterdir() if home is not None else ():
        if is_tokenizer_file(path):
            (room / path.name).symlink_to(path.absolute())
    _one_file(weights, room / WEIGHTS_FILE)
    (room / CONFIG_FILE).write_text(json.dumps(base.configuration), encoding="utf-8")
    return room, base
