"""Experts of strangers: taken in as bytes, checked, and put into the store by their sha256.

A file that comes is first copied to `incoming/<sha256>.safetensors` and forced to disk; only then may its arrival be acknowledged. It is
judged there, on the copy. What fits becomes an artifact of kind `expert`: the sender's weights with the configuration of the base, so
that nothing but numbers of the sender is ever used.

Invariant: an artifact of this kind has the tensors, shapes and dtypes of the base, every number finite, and the sha256 that it came with.
"""

import base64
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from merge_service.checkpoints import (
    WEIGHTS_FILE,
    Checkpoint,
    CheckpointWriter,
    adapter_files,
    locate,
    sha256_of,
    write_adapted,
)
from merge_service.errors import (
    AdapterCheckpoint,
    CheckpointError,
    CorruptCheckpoint,
    ForeignCheckpoint,
    IncompatibleCheckpoint,
    NonFiniteCheckpoint,
    QuantisedCheckpoint,
    UserError,
)
from merge_service.files import Made, make_directory, sync_directory, sync_file, temporary
from merge_service.merging import WIDTH, check_expert, copy_beside, said_of, task_vector, unit
from pipeline.errors import CorruptArtifact
from pipeline.files.disk import room_for
from pipeline.identity import step_fingerprint
from pipeline.kinds.specs import ExpertSpec, Spec
from pipeline.kinds.table import KINDS
from pipeline.plan.steps import RECORD_BYTES, Step
from pipeline.store.artifact import RECORD_FILE, Record
from pipeline.store.local import Store

STALE_SECONDS = 48 * 3600.0
Start = Callable[[], AbstractContextManager[Path]]
"""Gives the weights that an adapter stands on, for the length of a `with` block."""
REASONS = (
    (CorruptCheckpoint, "format.corrupt"), (ForeignCheckpoint, "format.foreign"), (NonFiniteCheckpoint, "format.non_finite"),
    (QuantisedCheckpoint, "format.quantised"), (AdapterCheckpoint, "format.adapter"), (IncompatibleCheckpoint, "format.tensors"),
    (CheckpointError, "format.unfit"),
)  # fmt: skip


@dataclass(frozen=True)
class Taken:
    """Bytes that were taken in, and the sha256 of the adapter that they were made of."""

    sha256: str
    bytes: int
    adapter: str = ""


def step_of(spec: Spec, slug: str, label: str, t: int = 0, disk_bytes: int = RECORD_BYTES) -> Step:
    """A step of a service, which stands in no plan."""
    body = spec.to_json()
    return Step(
        spec.kind, step_fingerprint(spec.kind, body), slug, label, t, "", body, spec.inputs(), disk_bytes=disk_bytes
    )  # fmt: skip


class Experts:
    """The experts of a service: those that are coming in, and those in the store."""

    def __init__(self, store: Store, base: Record, incoming: Path) -> None:
        self.store, self.base, self.incoming = store, base, incoming
        self._records: dict[str, Record] = {}
        self._rows: dict[str, int] = {}
        self._sketches = np.zeros((64, WIDTH), np.float32)

    def take(self, source: Path, max_bytes: int, start: Start) -> Taken:
        """Copy a checkpoint (file, shards, directory) in, durably; of an adapter, what it makes of the weights in `start()`.

        Raises UserError for what is no safetensors, or too large, and for an adapter that does not fit its start.
        """
        adapter = adapter_files(source)
        weights = adapter[1] if adapter else locate(source)
        make_directory(self.incoming)
        target = temporary(self.incoming / "expert.safetensors")
        with room_for(f"expert {source}", self.incoming):
            try:
                if adapter:
                    with start() as below:
                        write_adapted(below, source, target)
                    return replace(self.adopt(target, max_bytes), adapter=sha256_of(weights))
                if weights.suffix == ".safetensors":
                    _check_size(weights, weights.stat().st_size, max_bytes)
                    shutil.copyfile(weights, target)
                else:
                    _joined(weights, target, max_bytes)
                return self.adopt(target, max_bytes)
            finally:
                target.unlink(missing_ok=True)

    def adopt(self, file: Path, max_bytes: int) -> Taken:
        """Rename a whole file, which must be on the same file system, to its sha256, durably."""
        size = file.stat().st_size
        _check_size(file, size, max_bytes)
        sync_file(file)
        sha256 = sha256_of(file)
        file.replace(self._coming(sha256))
        sync_directory(self.incoming)
        return Taken(sha256, size)

    def adopt_link(self, file: Path, sha256: str) -> Taken:
        """Take a whole file in, durably, whose bytes have this sha256 and stay where they are, on the same file system."""
        make_directory(self.incoming)
        sync_file(file)
        target = temporary(self.incoming / "expert.safetensors")
        with room_for("an expert", self.incoming):
            _link(file, target)
            target.replace(self._coming(sha256))
            target.unlink(missing_ok=True)  # where both were one file, a rename does nothing
        sync_directory(self.incoming)
        return Taken(sha256, file.stat().st_size)

    def is_there(self, sha256: str) -> bool:
        """Whether the bytes of an expert came in, or are in the store."""
        return self._coming(sha256).is_file() or self.record(sha256) is not None

    def step(self, sha256: str) -> Step:
        """The step whose artifact is the expert with these bytes."""
        spec = ExpertSpec(KINDS["expert"].revision, sha256, self.base.fingerprint)
        return step_of(spec, "expert", f"expert {sha256[:12]}", disk_bytes=self.base.bytes + RECORD_BYTES)

    def record(self, sha256: str) -> Record | None:
        """The artifact of an expert; None if it is not in the store."""
        if sha256 not in self._records:
            found = self.store.record(ExpertSpec.kind, self.step(sha256).fingerprint)
            if found is None:
                return None
            self._records[sha256] = found
        return self._records[sha256]

    def path(self, sha256: str) -> Path:
        """The weights directory of an expert, verified. Raises CorruptArtifact if it is gone or damaged."""
        record = self.record(sha256)
        if record is None:
            raise CorruptArtifact(f"the expert {sha256} is not in {self.store.where}")
        return self.store.open_verified(record)

    def alike(self, sha256: str, others: Set[str], cosine: float) -> list[str]:
        """The experts among `others` whose task vector has at least this cosine with that of an expert, the nearest first.

        Raises CorruptArtifact for an expert that is gone.
        """
        for one in {sha256, *others} - self._rows.keys():
            self._add(one)
        held = self._sketches[: len(self._rows)]
        found = np.vecdot(
            held, held[self._rows[sha256]]
        )  # `@` wakes all cores from 513 experts on, for a tenth of a millisecond
        names = [*self._rows]  # by row
        near = sorted((-float(found[row]), names[row]) for row in np.flatnonzero(found > cosine))
        return [one for _, one in near if one in others and one != sha256]

    def _add(self, sha256: str) -> None:
        """Keep the sketch of an expert's task vector, of length 1, as a row of one matrix that grows by doubling."""
        record = self.record(sha256)
        if record is None:
            raise CorruptArtifact(f"the expert {sha256} is not in {self.store.where}")
        row, sketch = len(self._rows), base64.b64decode(record.result["sketch"])
        if row == len(self._sketches):
            self._sketches = np.concatenate([self._sketches, np.zeros_like(self._sketches)])
        self._sketches[row] = unit(np.frombuffer(sketch, np.float32, WIDTH))
        self._rows[sha256] = row

    def admit(self, sha256: str) -> Record:
        """Check an incoming file and put it into the store. Raises `CheckpointError` for one that cannot be merged."""
        known = self.record(sha256)
        if known is not None:
            return known
        file, weights = self._coming(sha256), self.store.open_verified(self.base) / WEIGHTS_FILE
        if not file.is_file():
            raise CheckpointError("its bytes are not there any more; send it again")
        check_expert(weights, file)
        vector, step = task_vector(weights, file), self.step(sha256)
        with self.store.staged(step) as stage:
            _link(file, stage / WEIGHTS_FILE)
            names = [name for name in self.base.files if name not in (WEIGHTS_FILE, RECORD_FILE)]
            copy_beside(self.base.path, names, stage)
            result = said_of(vector)
            found = sha256_of(stage / WEIGHTS_FILE)
            if found != sha256:
                raise CorruptCheckpoint(f"{file} no longer has the sha256 that it came with")
            return self.store.commit(step, stage, Made(result, {WEIGHTS_FILE: found}), seconds=0.0)

    def public(self, error: CheckpointError) -> str:
        """The message of an error without places of this machine, for the log."""
        text = re.sub(rf" ?\(?{re.escape(str(self.incoming))}/[0-9a-f]+\.safetensors\)?", "", str(error))
        return text.replace(str(self.base.path / WEIGHTS_FILE), "the base").replace(
            str(self.base.path), "the base"
        )

    def sweep(self, wanted: Set[str], known: Set[str]) -> None:
        """Remove incoming files of arrivals that are `known` and not `wanted`, and those that nobody has spoken of for two days."""
        for path in self.incoming.glob("*") if self.incoming.is_dir() else ():
            name = path.name.removesuffix(".safetensors")
            stale = name not in wanted and time.time() - path.lstat().st_mtime > STALE_SECONDS
            if stale or (name in known and name not in wanted):
                path.unlink(missing_ok=True)

    def forget(self, sha256: str) -> None:
        """Drop what is held in memory of an expert."""
        self._records.pop(sha256, None)
        if sha256 in self._rows:
            self._rows.clear()  # they are read again
            self._sketches[:] = 0

    def _coming(self, sha256: str) -> Path:
        return self.incoming / f"{sha256}.safetensors"


def reason_of(error: CheckpointError) -> str:
    """The stable reason for which an expert cannot be merged."""
    return next(reason for kind, reason in REASONS if isinstance(error, kind))


def _check_size(path: Path, size: int, most: int) -> None:
    if size > most:
        raise UserError(f"{path} has {size:,} bytes; admission.max_bytes allows {most:,}")


def _joined(index: Path, target: Path, most: int) -> None:
    """Write the tensors of a complete set of shards as one file."""
    with Checkpoint.open(index) as checkpoint:
        layout: Mapping[str, tuple[str, tuple[int, ...]]] = {
            name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()
        }
        _check_size(index, sum(info.nbytes for info in checkpoint.tensors.values()), most)
        with CheckpointWriter(target, dict(layout), dict(checkpoint.metadata)) as writer:
            for name in layout:
                writer.write_stored(name, 0, checkpoint.raw(name))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
