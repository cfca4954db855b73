"""Score one checkpoint from the command line exactly as a run scores it: same data, same functions, no cluster."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merge_service.checkpoint import CONFIG_FILE, WEIGHTS_FILE, locate
from merge_service.errors import UserError
from pipeline.config import Study, load_study
from pipeline.console import WARNING, complain
from pipeline.facts import cache_of, ensure_data, local_base
from pipeline.prompt_notes import prompt_notes
from pipeline.results import gm, ka, zs
from pipeline.steps import TEST
from workers.data.manifest import describe, verify
from workers.data.seen import notes
from workers.jobs import EvaluateJob, Source


def evaluate_checkpoint(
    checkpoint: Path, study_path: Path, overrides: Sequence[str], names: Sequence[str] | None
) -> dict[str, Any]:
    """{"checkpoint", "scores": {dataset: fraction}, "samples", "ka", "zs", "gm"}; the last three only without `names`.

    A bare .safetensors file is read with the configuration of the study's base. Raises UserError.
    """
    return score(checkpoint, load_study(study_path, overrides), names)


def score(checkpoint: Path, study: Study, names: Sequence[str] | None) -> dict[str, Any]:
    """The same for a study that has been read."""
    ensure_data(study)
    study = study.resolved()
    known = dict.fromkeys((*study.roles.adaptation, *study.roles.held_out))
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise UserError(
            f"--datasets: the study does not score {', '.join(unknown)}; it scores {', '.join(known)}"
        )
    with tempfile.TemporaryDirectory() as room:
        model = _weights_directory(checkpoint, study, Path(room))
        for note in _notes(model, study, names or list(known)):
            complain("note", note, WARNING)
        answer = _evaluate(model, study, names or list(known))
    if names is None:
        answer["ka"], answer["zs"] = (
            ka(answer["scores"], study.roles.adaptation),
            zs(answer["scores"], study.roles.held_out),
        )
        answer["gm"] = gm(answer["ka"], answer["zs"])
    return {"checkpoint": str(checkpoint), **answer}


def _notes(model: Path, study: Study, names: Sequence[str]) -> list[str]:
    """What to know of the test splits before their scores are believed. Raises ShardError."""
    root, cache, said = study.data_root, cache_of(study), list[str]()
    for name in names:
        info = describe(root, name, cache)
        if TEST in info.splits:
            said += notes(info, {TEST: verify(root, name, TEST, cache)})
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
        datasets=tuple(Source(root, name, "test") for name in names),
        fraction=options.fraction,
        seed=options.seed,
        batch_size=options.batch_size,
        threads=resources.evaluation.threads or 1,
        device=resources.evaluation_device,
        cache=str(cache_of(study).absolute()),
    )
    answer = evaluate(job)
    return {"scores": answer["scores"], "samples": answer["samples"]}


def _weights_directory(checkpoint: Path, study: Study, room: Path) -> Path:
    """The checkpoint as a weights directory, lent the base's configuration if it has none."""
    if checkpoint.is_dir() and (checkpoint / CONFIG_FILE).is_file():
        return checkpoint
    weights, base = locate(checkpoint), local_base(study.model)
    if base is None or not (base / CONFIG_FILE).is_file():
        raise UserError(
            f"{checkpoint} has no {CONFIG_FILE} beside it, and the study's base is no directory to take one from; "
            "put the checkpoint into a weights directory"
        )
    for path in base.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (room / path.name).symlink_to(path.absolute())
    (room / WEIGHTS_FILE).symlink_to(weights.absolute())
    return room
