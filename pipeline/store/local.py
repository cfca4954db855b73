"""The memory of a study: artifacts named by what made them, committed whole or not at all, checked on every read.

Layout: `ROOT/<kind>/<slug>-<first 16 digits of the fingerprint>/`, each with its `record.json`. A step writes into a staging
directory on the same file system; commit forces files to disk, hashes them, writes the record last inside the stage, and
renames the stage into place. `.names/` leads from a fingerprint to its directory, so nothing costs more when there are many
artifacts. Invariant: a directory under a kind is complete from the moment it has its name, whatever
process dies when; two results of one step are one artifact or an error, never a choice.
"""

import contextlib
import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from merge_service.faults import point
from merge_service.files import sync_directory
from pipeline.errors import CorruptArtifact, NondeterminismError, StorageFull, StoreError, StoreUnwritable
from pipeline.files.disk import free_bytes, full_text, is_full
from pipeline.files.ownership import is_abandoned, locked, owner_mark
from pipeline.kinds.table import KINDS
from pipeline.store import audit
from pipeline.store.artifact import (
    RECORD_FILE,
    Record,
    difference,
    hash_file,
    list_files,
    read_record,
    write_record,
)
from pipeline.store.lease import Files, Shelf
from pipeline.store.names import DIGITS, Names, is_there
from pipeline.store.versions import here

_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}

_sound: set[tuple[str, int, int, int]] = set()
_verified: dict[tuple[str, int, int, int, int], str] = {}


class StepLike(Protocol):
    """What the store needs to know of a step."""

    @property
    def kind(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def slug(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def spec(self) -> dict[str, Any]: ...
    @property
    def inputs(self) -> dict[str, str]: ...
    @property
    def disk_bytes(self) -> int: ...


@dataclass(frozen=True)
class Store:
    """A store at `root`. It holds nothing but the path, so it travels between processes."""

    root: Path
    poll_seconds: ClassVar[float] = 1.0
    """How often it may be asked what has become of a step that another driver carries out."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root).absolute())

    @property
    def where(self) -> str:
        """The place of the store, for people."""
        return str(self.root)

    @property
    def shelf(self) -> Shelf:
        """Where its small files lie beside the artifacts: leases."""
        return Files(self.root)

    def prepare(self) -> None:
        """Create the store, make sure it can be written, and remove what dead writers left. Raises StoreUnwritable."""
        with self._guarded("prepare", 0):
            for name in (*KINDS, ".stage"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            Names(self.root).complete()
            sync_directory(self.root)
            probe = self.root / ".stage" / f"probe.{owner_mark()}.{uuid.uuid4().hex[:8]}"
            probe.mkdir()
            probe.rmdir()
        self.sweep()

    def sweep(self) -> list[Path]:
        """Remove staging directories whose writers are gone; returns them."""
        removed = []
        for stage in (self.root / ".stage").glob("*"):
            with contextlib.suppress(OSError):
                mark = [*stage.name.rsplit(".", 2), "", ""][1]
                if is_abandoned(mark, time.time() - stage.lstat().st_mtime):
                    shutil.rmtree(stage) if stage.is_dir() else stage.unlink()
                    removed.append(stage)
        return removed

    def path(self, kind: str, fingerprint: str, slug: str) -> Path:
        """Where the artifact of a step is, or will be if it is not there yet.

        Another study may have named the same step otherwise, so the fingerprint decides, not the slug.
        """
        return self._locate(fingerprint, kind) or self._own_path(kind, fingerprint, slug)

    def has(self, kind: str, fingerprint: str) -> bool:
        """Whether there is a record of the step; cheap to ask again."""
        found = self._locate(fingerprint, kind)
        try:
            stat = (found / RECORD_FILE).stat() if found is not None else None
        except OSError:
            return False
        if found is None or stat is None:
            return False
        key = (str(found), stat.st_size, stat.st_mtime_ns, stat.st_ino)
        if key not in _sound and self.record(kind, fingerprint) is not None:
            _sound.add(key)
        return key in _sound

    def record(self, kind: str, fingerprint: str) -> Record | None:
        """The record of a step's artifact; None if there is no artifact or its record is damaged. Changes nothing."""
        found = self._locate(fingerprint, kind)
        if found is None:
            return None
        try:
            record = read_record(found)
        except CorruptArtifact:
            return None
        return record if (record.kind, record.fingerprint) == (kind, fingerprint) else None

    def find(self, fingerprint: str) -> Record | None:
        """The record with this fingerprint, of whatever kind."""
        found = self._locate(fingerprint)
        return None if found is None else self.record(found.parent.name, fingerprint)

    def records(self, kind: str) -> Iterator[Record]:
        """All readable records of a kind, by directory name."""
        for directory in sorted((self.root / kind).glob("[!.]*")):
            with contextlib.suppress(CorruptArtifact):
                yield read_record(directory)

    @contextlib.contextmanager
    def staged(self, step: StepLike | None = None) -> Iterator[Path]:
        """A new directory for a step's output; whatever has not been committed at the end of the block is removed.

        Raises StorageFull if the step's `disk_bytes` do not fit or the disk runs full within the block, StoreUnwritable if
        the store cannot be written.
        """
        name = "stage" if step is None else f"{step.kind}-{step.fingerprint[:16]}"
        needed = 0 if step is None else int(getattr(step, "disk_bytes", 0) or 0)
        stage = self.root / ".stage" / f"{name}.{owner_mark()}.{uuid.uuid4().hex[:8]}"
        what = name if step is None else step.label
        with self._guarded(what, needed):
            self._check_free(what, needed)
            stage.mkdir(parents=True)
        try:
            with self._guarded(what, needed, foreign=True):
                yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def make(self, step: StepLike, work: Callable[[Path], Mapping[str, Any]]) -> Record:
        """Carry out a step: check its inputs, let `work` write its output into a new directory, and commit that with the result.

        Raises what `open_inputs`, `staged`, `work` and `commit` raise; nothing is left of a step that fails.
        """
        self.open_inputs(step)
        started = time.monotonic()
        with self.staged(step) as stage:
            result = work(stage)
            record = self.commit(step, stage, result, seconds=time.monotonic() - started)
        point(f"{step.kind}.after_commit")
        return record

    def commit(
        self,
        step: StepLike,
        stage: Path,
        result: Mapping[str, Any],
        *,
        seconds: float,
        versions: Mapping[str, str] | None = None,
    ) -> Record:
        """Make the content of `stage` the artifact of `step` and return its record.

        `result` is plain JSON without NaN. If the artifact is there already with the same bytes, nothing happens and its
        record is returned; with other bytes, both are kept and NondeterminismError is raised. Raises StorageFull, StoreError.
        """
        point("store.after_stage")
        with self._guarded(step.label, step.disk_bytes):
            files = _settle(stage)
            point("store.after_fsync")
            home = self._home(step)
            record = Record(
                kind=step.kind,
                fingerprint=step.fingerprint,
                slug=home.name.rpartition("-")[0] or step.slug,
                spec=step.spec,
                inputs=dict(step.inputs),
                input_digests=self._input_digests(step),
                files=files,
                result=_plain(result, step),
                created_ms=time.time_ns() // 1_000_000,
                seconds=round(float(seconds), 6),
                versions=dict(versions or here()),
                path=home,
            )
            point("store.before_record")
            write_record(record, stage)
            for directory in [path for path in stage.rglob("*") if path.is_dir()] + [stage]:
                sync_directory(directory)
            return self._place(record, stage, step)

    def open_verified(self, record: Record) -> Path:
        """The artifact's directory, every file checked against its sha256 (once per process while its stat stands).

        A damaged artifact is moved aside and CorruptArtifact raised: the step can then be run again.
        """
        directory = record.path
        try:
            inode = directory.stat().st_ino
        except OSError as error:
            raise CorruptArtifact(f"{directory} cannot be read: {error.strerror or error}") from error
        for name, entry in record.files.items():
            problem = _changed(directory, name, entry)
            if problem is not None:
                raise CorruptArtifact(f"{problem}; {self._set_aside(directory, inode)}")
        return directory

    def open_inputs(self, step: StepLike) -> dict[str, Path]:
        """Directories of all inputs of a step by role, verified. Raises CorruptArtifact if one is damaged or gone."""
        opened = {}
        for role, fingerprint in step.inputs.items():
            record = self.find(fingerprint)
            if record is None:
                raise CorruptArtifact(
                    f"{step.label}: its input {role} ({fingerprint[:16]}) is not in {self.where}; run again"
                )
            opened[role] = self.open_verified(record)
        return opened

    def check_room(self, what: str, needed: int) -> None:
        """Raise StorageFull unless `needed` bytes are free; `what` is told in the message."""
        self._check_free(what, needed)

    def _check_free(self, what: str, needed: int) -> None:
        with self._guarded(what, needed):
            free = free_bytes(self.root)
        if needed and free < needed:
            raise StorageFull(full_text(what, self.root, needed, free), needed, free)

    def verify(self, progress: Callable[[Path], None] | None = None) -> list[str]:
        """Re-hash every artifact and follow every lineage edge; the problems found, each with its path. Changes nothing."""
        return audit.problems(self, tuple(KINDS), progress)

    def _place(self, record: Record, stage: Path, step: StepLike) -> Record:
        """Give a finished stage its name, unless the artifact is there already."""
        with locked(self.root / ".lock"):
            record.path.parent.mkdir(parents=True, exist_ok=True)
            if is_there(record.path):
                try:
                    existing = read_record(record.path)
                except CorruptArtifact:
                    self._move(record.path, ".corrupt")
                else:
                    return self._same_or_refuse(existing, record, stage, step)
            try:
                stage.rename(record.path)
            except OSError as error:  # where there are no locks another may have been first
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                return self._same_or_refuse(read_record(record.path), record, stage, step)
        point("store.after_rename")
        sync_directory(record.path.parent)
        return record

    def _same_or_refuse(self, existing: Record, record: Record, stage: Path, step: StepLike) -> Record:
        if existing.fingerprint != record.fingerprint:
            raise StoreError(
                f"{existing.path} belongs to another step with the same first 16 digits; remove it and run again"
            )
        differing = differences(existing, record)
        if not differing:
            return existing
        kept = self._move(stage, ".conflicts", record.path.name)
        raise conflict(step.label, differing, str(existing.path), str(kept))

    def _set_aside(self, directory: Path, inode: int) -> str:
        """Quarantine an artifact if it is still the one that was found damaged; says what became of it."""
        try:
            with self._guarded(directory.name, 0), locked(self.root / ".lock"):
                if directory.stat().st_ino == inode:
                    return f"it was moved to {self._move(directory, '.corrupt')}; run again to make it anew"
        except StoreError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                return f"it could not be moved aside ({error}); remove it and run again"
        return "another process has moved it aside; run again"

    def _move(self, directory: Path, room: str, name: str = "") -> Path:
        target = self.root / room
        target.mkdir(exist_ok=True)
        target = target / f"{name or directory.name}.{uuid.uuid4().hex[:8]}"
        directory.rename(target)
        return target

    def _input_digests(self, step: StepLike) -> dict[str, str]:
        found = {role: self.find(fingerprint) for role, fingerprint in step.inputs.items()}
        return {role: record.digest for role, record in found.items() if record is not None}

    def _home(self, step: StepLike) -> Path:
        """Where the artifact of a step is to be, whoever else makes it at the same time."""
        self._own_path(step.kind, step.fingerprint, step.slug)
        return Names(self.root).claim(step.kind, step.fingerprint[:DIGITS], step.slug)

    def _own_path(self, kind: str, fingerprint: str, slug: str) -> Path:
        if kind not in KINDS or not slug or "/" in slug or slug.startswith(".") or "\0" in slug:
            raise ValueError(f"no such artifact: kind {kind!r}, slug {slug!r}")
        return self.root / kind / f"{slug}-{fingerprint[:16]}"

    def _locate(self, fingerprint: str, kind: str | None = None) -> Path | None:
        found = Names(self.root).find(fingerprint[:DIGITS])
        return found if found is None or kind in (None, found.parent.name) else None

    @contextlib.contextmanager
    def _guarded(self, what: str, needed: int, foreign: bool = False) -> Iterator[None]:
        """Turn errors of the disk into ours. In `foreign` code other errors than a full disk pass as they are."""
        try:
            yield
        except Exception as error:
            if is_full(error):
                free = free_bytes(self.root)
                raise StorageFull(full_text(what, self.root, needed, free), needed, free) from error
            if foreign or not isinstance(error, OSError):
                raise
            if error.errno in _UNWRITABLE:
                reason = error.strerror or str(error)
                raise StoreUnwritable(
                    f"{self.root} cannot be written ({reason}); choose another --out or mend it"
                ) from error
            raise StoreError(f"{what}: {self.root} failed: {error}") from error


def differences(one: Record, two: Record) -> list[str]:
    """What two results of one step do not have in common: names of files, and "scores"."""
    differing = sorted(name for name in {*one.files, *two.files} if one.sha256(name) != two.sha256(name))
    return [*differing, "scores"] if one.result.get("scores") != two.result.get("scores") else differing


def conflict(label: str, differing: list[str], first: str, second: str) -> NondeterminismError:
    """The error for two results of one step, which are kept at `first` and `second`."""
    return NondeterminismError(
        f"{label}: computed twice with different results ({', '.join(differing)}). The first is {first}, the "
        f"second was kept at {second}. Compare them; likely causes: another thread or world size, device, or library version",
        first,
        second,
    )


def _settle(stage: Path) -> dict[str, dict[str, Any]]:
    """Force every file of a stage to disk and hash it."""
    files: dict[str, dict[str, Any]] = {}
    (stage / RECORD_FILE).unlink(missing_ok=True)
    for name in list_files(stage):
        path = stage / name
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        files[name] = {"sha256": hash_file(path), "bytes": path.stat().st_size}
    return files


def _changed(directory: Path, name: str, entry: dict[str, Any]) -> str | None:
    """As `difference`, but a file found right is not read again by this process while its stat stands."""
    try:
        found = (directory / name).lstat()
    except OSError as error:
        return f"{directory / name} cannot be read: {error.strerror or error}"
    key = (str(directory / name), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
    if found.st_size == entry["bytes"] and _verified.get(key) == entry["sha256"]:
        return None
    problem = difference(directory, name, entry)
    if problem is None:
        _verified[key] = str(entry["sha256"])
    return problem


def _plain(result: Mapping[str, Any], step: StepLike) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(result), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"{step.label}: its result is not plain JSON ({error}); use null where there is no number"
        ) from error
    return plain
