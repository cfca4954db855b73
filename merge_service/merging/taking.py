"""Takes in an expert that was trained elsewhere: its bytes with the configuration of the base, so that nothing else of it is used.

Invariant: what is taken in has the tensors, shapes and dtypes of the base, finite numbers, and the sha256 that was stated.
"""

import base64
import shutil
from collections.abc import Iterable
from pathlib import Path

from merge_service.checkpoints.admission import admit, check_finite
from merge_service.checkpoints.checkpoint import WEIGHTS_FILE, Checkpoint, sha256_of
from merge_service.checkpoints.unmergeable import check_mergeable
from merge_service.errors import CorruptCheckpoint, IncompatibleCheckpoint
from merge_service.files.made import Made
from merge_service.merging.jobs import TakeJob
from merge_service.merging.vector import TaskVector, task_vector


def take(job: TakeJob, stage: Path) -> Made:
    """Copy an expert and the files of the base beside it into `stage`; the result says how far it moved.

    Raises `CheckpointError` for weights that are not those that were planned, or are none of the base's.
    """
    file = stage / WEIGHTS_FILE
    shutil.copyfile(job.source, file)
    sha256 = sha256_of(file)
    if sha256 != job.sha256:
        raise CorruptCheckpoint(
            f"{job.label}: {job.source} has changed since the study was planned (sha256 {sha256[:16]}..., not {job.sha256[:16]}...); run again"
        )
    check_expert(job.base / WEIGHTS_FILE, file, job.label)
    copy_beside(job.base, job.beside, stage)
    return Made(said_of(task_vector(job.base / WEIGHTS_FILE, file)), {WEIGHTS_FILE: sha256})


def copy_beside(base: Path, names: Iterable[str], stage: Path) -> None:
    """Copy the files of a base that go with weights."""
    for name in names:
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / name, stage / name)


def said_of(vector: TaskVector) -> dict[str, object]:
    """A task vector in plain JSON values: `norms`, `unchanged`, and `sketch` in base64."""
    sketch = base64.b64encode(vector.sketch.tobytes()).decode()
    return {"norms": dict(vector.norms), "unchanged": vector.unchanged, "sketch": sketch}


def check_expert(base: Path, expert: Path, who: str = "the expert") -> None:
    """Raise `CheckpointError` unless an expert has the tensors of the base, of the same types, and finite numbers."""
    with Checkpoint.open(base) as reference, Checkpoint.open(expert) as candidate:
        check_mergeable(candidate, who)
        notes = admit(reference, candidate, who)
        if notes:
            raise IncompatibleCheckpoint(f"{who}: its tensors are not named as the base's: {notes[0]}")
        other = [
            f"{name} is {info.dtype}, not {reference.tensors[name].dtype}"
            for name, info in candidate.tensors.items()
            if info.dtype != reference.tensors[name].dtype or info.shape != reference.tensors[name].shape
        ]
        if other:
            raise IncompatibleCheckpoint(
                f"{who}: its tensors do not have the base's types: {'; '.join(other[:10])}"
            )
        check_finite(candidate, who)
