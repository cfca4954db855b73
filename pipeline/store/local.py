"""The store of a study: artifacts named by the fingerprint of their step, committed whole or not at all, checked on every read.

Layout: `ROOT/<kind>/<slug>-<first 16 digits of the fingerprint>/`, each with its `record.json`. A step writes into a
staging directory on the same file system. Commit syncs the files to disk, hashes them, writes the record last, and
renames the stage to its final name. `.names/` maps a fingerprint to its directory, so access does not slow down with
the number of artifacts.
Invariant: a directory under a kind is complete from the moment it has its name, whichever process ends when. Two
results of one step are one artifact or an error, never a choice.
"""

import contextlib
import errno
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from merge_service.faults import point
from merge_service.files import Made, make_directory, sync_directory, sync_file
from pipeline.errors import CorruptArtifact, StorageFull, StoreError
from pipeline.files.disk import free_bytes, full_text, is_full, unwritable
from pipeline.files.ownership import is_abandoned, locked, owner_mark
from pipeline.kinds.table import KINDS
from pipeline.store import audit
from pipeline.store.artifact import (
    RECORD_FILE,
    AtCommit,
    FileEntry,
    Record,
    conflict,
    difference,
    differences,
    hash_file,
    is_whole,
    list_files,
    read_record,
    write_record,
)
from pipeline.store.lease import Files, Shelf
from pipeline.store.names import DIGITS, Names, is_there, stage_name
from pipeline.store.recipes import Described, Recipes
from pipeline.store.versions import here

_sound: set[tuple[str, int, int, int]] = set()
_verified: dict[tuple[str, int, int, int, int], str] = {}


class StepLike(Described, Protocol):
    """The part of a step that the store needs."""

    @property
    def slug(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def inputs(self) -> dict[str, str]: ...
    @property
    def disk_bytes(self) -> int: ...


CACHE_BYTES = 20 * 10**9


@dataclass(frozen=True)
class Store:
    """A store at `root`. It holds no more than the path, so it travels between processes."""

    root: Path
    cache_bytes: int = field(default=CACHE_BYTES, kw_only=True)
    """How much of the weights that were made again from recipes is kept for the next time."""
    poll_seconds: ClassVar[float] = 1.0
    """The least interval between queries for a step that another driver carries out."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root).absolute())

    @property
    def where(self) -> str:
        """The location of the store, for messages."""
        return str(self.root)

    @property
    def recipes(self) -> Recipes:
        """Merges that are kept as recipes."""
        return Recipes(self)

    @property
    def shelf(self) -> Shelf:
        """Where small files beside the artifacts are stored: leases."""
        return Files(self.root)

    def prepare(self) -> None:
        """Create the store, check that it is writable, and remove what dead writers left. Raises StoreUnwritable."""
        with self._guarded("prepare", 0):
            for name in (*KINDS, ".stage"):
                make_directory(self.root / name)
            Names(self.root).complete()
            sync_directory(self.root)
            probe = self.root / ".stage" / f"probe.{owner_mark()}.{uuid.uuid4().hex[:8]}"
            probe.mkdir()
            probe.rmdir()
        self.sweep()

    def sweep(self) -> list[Path]:
        """Remove staging directories whose writers have ended; returns them."""
        removed = []
        for stage in (self.root / ".stage").glob("*"):
            with contextlib.suppress(OSError):
                mark = [*stage.name.rsplit(".", 2), "", ""][1]
                if is_abandoned(mark, time.time() - stage.lstat().st_mtime):
                    shutil.rmtree(stage) if stage.is_dir() else stage.unlink()
                    removed.append(stage)
        return removed

    def being_written(self, steps: Iterable[StepLike]) -> list[StepLike]:
        """Those of the steps of which some process has a staging directory."""
        there = {stage.name.partition(".")[0] for stage in (self.root / ".stage").glob("*")}
        return [step for step in steps if stage_name(step.kind, step.fingerprint) in there] if there else []

    def path(self, kind: str, fingerprint: str, slug: str) -> Path:
        """The directory of the artifact of a step, whether it exists yet or not.

        Another study may have given the same step another slug, so the fingerprint decides, not the slug.
        """
        return self._locate(fingerprint, kind) or self._own_path(kind, fingerprint, slug)

    def has(self, kind: str, fingerprint: str) -> bool:
        """Whether there is a record of the step; repeated calls are cheap."""
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
        """The record with this fingerprint, of any kind."""
        found = self._locate(fingerprint)
        return None if found is None else self.record(found.parent.name, fingerprint)

    def records(self, kind: str) -> Iterator[Record]:
        """All readable records of a kind, sorted by directory name."""
        for directory in sorted((self.root / kind).glob("[!.]*")):
            with contextlib.suppress(CorruptArtifact):
                yield read_record(directory)

    @contextlib.contextmanager
    def staged(self, step: StepLike | None = None) -> Iterator[Path]:
        """A new directory for the output of a step; it is removed at the end of the block unless it was committed.

        Raises StorageFull if the step's `disk_bytes` do not fit or the disk fills up within the block, StoreUnwritable
        if the store cannot be written.
        """
        name = "stage" if step is None else stage_name(step.kind, step.fingerprint)
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

    def make(
        self, step: StepLike, work: Callable[[Path], Mapping[str, object] | Made], *, held: AtCommit = "files"
    ) -> Record:
        """Carry out a step: check its inputs, let `work` write its output into a new directory, and commit that with the result.

        A merge may be committed as a "recipe", an expert as an "adapter": weights are cached from the start, and nothing syncs them.
        Raises the errors of `open_inputs`, `staged`, `work` and `commit`; a step that fails leaves nothing behind.
        """
        with contextlib.ExitStack() as inputs:
            self.open_inputs(step, inputs)
            return self._made(step, work, held)

    def _made(
        self, step: StepLike, work: Callable[[Path], Mapping[str, Any] | Made], held: AtCommit
    ) -> Record:
        started = time.monotonic()
        with self.staged(step) as stage:
            result = work(stage)
            record = self.commit(step, stage, result, seconds=time.monotonic() - started, held=held)
        if record.is_made:
            self.recipes.touch(record)
        if record.held == "adapter":
            self.recipes.trim(record)
        point(f"{step.kind}.after_commit")
        return record

    def commit(
        self,
        step: StepLike,
        stage: Path,
        result: Mapping[str, object] | Made,
        *,
        seconds: float,
        versions: Mapping[str, str] | None = None,
        held: AtCommit = "files",
    ) -> Record:
        """Make the content of `stage` the artifact of `step` and return its record.

        `result` is plain JSON without NaN; what was hashed while it was written (`Made`) is not read again. `held` as in `make`.
        If the artifact exists with the same bytes, its record is returned and
        nothing changes. If it exists with other bytes, both are kept and NondeterminismError is raised. Raises
        StorageFull, StoreError.
        """
        point("store.after_stage")
        with self._guarded(step.label, step.disk_bytes):
            made = result if isinstance(result, Made) else Made(result)
            files = _sync_and_hash(stage, held, made.sha256)
            point("store.after_fsync")
            home = self._home(step)
            record = Record(
                kind=step.kind,
                fingerprint=step.fingerprint,
                slug=home.name.rpartition("-")[0] or step.slug,
                spec=dict(step.spec),
                inputs=dict(step.inputs),
                input_digests=self._input_digests(step),
                files=files,
                result=_plain(made.result, step),
                created_ms=time.time_ns() // 1_000_000,
                seconds=round(float(seconds), 6),
                versions=dict(versions or here()),
                path=home,
                held=held,
            )
            point("store.before_record")
            write_record(record, stage)
            for directory in [path for path in stage.rglob("*") if path.is_dir()] + [stage]:
                sync_directory(directory)
            return self._place(record, stage, step)

    def open_verified(self, record: Record) -> Path:
        """The artifact's directory, with every file checked against its sha256 (once per process while its stat is unchanged).

        A damaged artifact is moved aside and CorruptArtifact is raised, so that the step can run again.
        """
        directory = record.path
        try:
            inode = directory.stat().st_ino
        except OSError as error:
            raise CorruptArtifact(f"{directory} cannot be read: {error.strerror or error}") from error
        for name, entry in record.files.items():
            problem = _changed(directory, name, entry)
            if problem is not None:
                recipe = self._recipe_of(record, name)
                if recipe is None:
                    raise CorruptArtifact(f"{problem}; {self._set_aside(directory, inode)}")
                (directory / name).unlink(missing_ok=True)
                try:
                    self.recipes.make(recipe)
                except CorruptArtifact as error:
                    if recipe.is_recipe:
                        raise
                    raise CorruptArtifact(f"{error}; {self._set_aside(directory, inode)}") from error
        return directory

    def _recipe_of(self, record: Record, name: str) -> Record | None:
        """What stands in the store for a merge whose file is wrong or gone, if that file can be made again."""
        try:
            current = read_record(record.path)
        except CorruptArtifact:
            return None
        return current if current.is_made and name in current.droppable else None

    def open_inputs(self, step: StepLike, held: contextlib.ExitStack | None = None) -> dict[str, Path]:
        """Directories of all inputs of a step by role, verified. Raises CorruptArtifact if one is damaged or gone.

        Weights that are kept as recipes are made, and stay until `held` is closed.
        """
        opened = {}
        for role, fingerprint in step.inputs.items():
            record = self.find(fingerprint)
            if record is None:
                raise CorruptArtifact(
                    f"{step.label}: its input {role} ({fingerprint[:16]}) is not in {self.where}; run again"
                )
            opened[role] = self.open_verified(record) if held is None else self.recipes.opened(record, held)
        return opened

    def check_room(self, what: str, needed: int) -> None:
        """Raise StorageFull unless `needed` bytes are free; the message names `what`."""
        self._check_free(what, needed)

    def free_bytes(self) -> int | None:
        """Bytes that may still be written; None where there is no limit."""
        return free_bytes(self.root)

    def _check_free(self, what: str, needed: int) -> None:
        with self._guarded(what, needed):
            free = free_bytes(self.root)
        if needed and free < needed:
            raise StorageFull(full_text(what, self.root, needed, free), needed, free)

    def verify(self, progress: Callable[[Path], None] | None = None) -> list[str]:
        """Re-hash every artifact and follow every lineage edge. Returns the problems, each with its path. Changes nothing."""
        return audit.problems(self, tuple(KINDS), progress)

    def _place(self, record: Record, stage: Path, step: StepLike) -> Record:
        """Rename a finished stage to its final name, unless the artifact exists already."""
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
            except OSError as error:  # without file locks, another writer may have been first
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
            self._fill(existing, stage)
            return existing
        kept = self._move(stage, ".conflicts", record.path.name)
        raise conflict(step.label, differing, str(existing.path), str(kept))

    def _fill(self, existing: Record, stage: Path) -> None:
        """Weights made anew of an artifact that is kept as a recipe: its inputs were gone, so take what has come."""
        for name in self.recipes.missing(existing) if existing.is_made else ():
            (stage / name).replace(existing.path / name)
            self.recipes.touch(existing)

    def _set_aside(self, directory: Path, inode: int) -> str:
        """Quarantine an artifact if it is still the one that was found damaged; returns what was done, for the message."""
        try:
            with self._guarded(directory.name, 0), locked(self.root / ".lock"):
                if directory.stat().st_ino == inode:
                    return f"it was moved to {self._move(directory, '.corrupt')}; run again to recompute it"
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
        """The directory for the artifact of a step, the same for all processes that make it at the same time."""
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
        """Convert disk errors to errors of the store. Within `foreign` code, only that of a full disk is converted."""
        try:
            yield
        except Exception as error:
            if is_full(error):
                free = free_bytes(self.root)
                raise StorageFull(full_text(what, self.root, needed, free), needed, free) from error
            if foreign or not isinstance(error, OSError):
                raise
            refused = unwritable(error, self.root) or StoreError(f"{what}: {self.root} failed: {error}")
            raise refused from error


def _sync_and_hash(stage: Path, held: AtCommit, known: Mapping[str, str]) -> dict[str, FileEntry]:
    """Hash every file of a stage whose sha256 is not known, and force to disk what cannot be made again."""
    files: dict[str, FileEntry] = {}
    (stage / RECORD_FILE).unlink(missing_ok=True)
    for name in list_files(stage):
        path = stage / name
        if held == "files" or not is_whole(name):
            sync_file(path)
        files[name] = {"sha256": known.get(name) or hash_file(path), "bytes": path.stat().st_size}
    return files


def _changed(directory: Path, name: str, entry: FileEntry) -> str | None:
    """Like `difference`, but a file found right is not read again by this process while its stat is unchanged."""
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
            f"{step.label}: its result is not plain JSON ({error}); use null for a missing number"
        ) from error
    return plain
