"""Recipes: merged weights that are not kept, and are made again from their record whenever they are wanted.

A merge is a pure function of its inputs, so the record of a committed merge says how to make it. Dropping a merge replaces its weights
by that promise; opening it makes the weights again, in their place, so that no other code knows of recipes.
Invariant: at every moment the weights are there or can be made again with the sha256 of the record. Weights are dropped only after the
same code rebuilt such a merge, never while a process uses them, and never if they depend on code or libraries outside this project.

A process that uses an artifact holds a shared lock on its `record.json`; dropping and making need the exclusive one. A file system
without locks has no recipes: nothing is dropped there.
"""

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from merge_service.errors import CheckpointError, UserError
from merge_service.faults import point
from merge_service.files import sync_directory, sync_file
from pipeline.errors import CorruptArtifact, NondeterminismError, StoreError
from pipeline.files.ownership import file_lock, owner_mark
from pipeline.identity import fingerprint as digest_of
from pipeline.kinds.specs import MergeSpec, TrainSpec
from pipeline.store.artifact import PACKED, RECORD_FILE, Held, Record, difference, read_record, write_record
from pipeline.store.names import DIGITS
from pipeline.store.versions import here

CACHE, PROOFS = ".cache", ".proofs"
IN_USE = "it is in use, or its file system has no locks"
"""Why weights stay that may go a moment later."""
PROVE_ONE_IN = 20
"""After the first merge of a technique and its parameters, one in so many is rebuilt before it is dropped."""
WAIT_SECONDS = 600.0
"""How long making weights waits for the lock; without it the weights are put in place all the same, as they are whole."""


class Shelved(Protocol):
    """What recipes need of a store."""

    @property
    def root(self) -> Path: ...
    @property
    def cache_bytes(self) -> int: ...
    def find(self, fingerprint: str) -> Record | None: ...
    def records(self, kind: str) -> Iterator[Record]: ...
    def open_verified(self, record: Record) -> Path: ...
    def staged(self) -> contextlib.AbstractContextManager[Path]: ...


class Described(Protocol):
    """A step, or the record of one."""

    @property
    def kind(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def spec(self) -> Mapping[str, object]: ...


@dataclass(frozen=True)
class Recipes:
    """The recipes of a store in a directory."""

    store: Shelved

    @contextlib.contextmanager
    def in_use(self, record: Record) -> Iterator[None]:
        """Within the block the weights of an artifact are not dropped."""
        with _record_lock(record.path, shared=True):
            yield

    def opened(self, record: Record, held: contextlib.ExitStack) -> Path:
        """The verified directory of an artifact, whose weights stay there until `held` is closed."""
        while True:
            path = self.store.open_verified(record)
            with contextlib.ExitStack() as attempt:
                attempt.enter_context(self.in_use(record))
                if not self.missing(record):
                    held.push(attempt.pop_all())
                    return path

    def drop(self, record: Record) -> str | None:
        """Keep a merge as a recipe from now on; returns why its weights stay, None if they went.

        The first merge of a technique with its parameters, one in `PROVE_ONE_IN` of the others, and every merge that other library
        versions made is rebuilt before; weights that came out otherwise stay.
        """
        why = not_portable(record)
        if why is not None:
            return why
        if dict(record.versions) != dict(here()) or not self.proof(record).exists():
            problem = self.prove(record)
            if problem is not None:
                return problem
        return self._give_up(record, "recipe")

    def prove(self, record: Record) -> str | None:
        """Make a merge again beside its weights, which shows that it may be dropped; returns why it may not."""
        try:
            with self.store.staged() as stage:
                self.rebuild(record, stage / "made")
        except StoreError as error:
            return str(error)
        for proof in self._proofs(record):
            proof.parent.mkdir(exist_ok=True)
            proof.touch()
        return None

    def proof(self, merge: Described) -> Path:
        """The file that exists once this code, with these versions of libraries, has made such a merge again."""
        return self._proofs(merge)[-1]

    def _proofs(self, merge: Described) -> tuple[Path, ...]:
        """What making this merge again proves: its technique with these parameters, and, for one in `PROVE_ONE_IN`, itself."""
        spec = MergeSpec.of(merge.spec)
        what = [spec.version, spec.technique, dict(spec.params), spec.form, dict(here())]
        sampled = int(merge.fingerprint[:8], 16) % PROVE_ONE_IN == 0
        proved = [what, [*what, merge.fingerprint]] if sampled else [what]
        return tuple(self.store.root / PROOFS / digest_of(one)[:DIGITS] for one in proved)

    def pack(self, record: Record, base: Record) -> str | None:
        """Keep weights as their difference from a base from now on; returns why they stay as they are, None if they went.

        The difference is unpacked and compared with the sha256 of the record before.
        """
        if len(record.droppable) != 1 or len(base.droppable) != 1:
            return "its weights are not one file"
        if not record.is_made:
            problem = self._write_packed(record, base)
            if problem is not None:
                return problem
        return self._give_up(record, "packed")

    def keep(self, record: Record) -> None:
        """Keep the weights of a recipe as files from now on, made if they are not there. Raises what `make` does."""
        with contextlib.ExitStack() as held:
            path = self.opened(record, held)
            for name in record.droppable:
                sync_file(path / name)
            self._write(replace(record, held="files"), "recipe.before_files")
            self._marker(record).unlink(missing_ok=True)
            for packed in record.path.glob(f"{PACKED}*"):
                packed.unlink(missing_ok=True)

    def make(self, record: Record) -> None:
        """Put the weights of a recipe in their place, and drop others that were made so and not used for longest, above the bound.

        Raises CorruptArtifact when an input is damaged or gone, NondeterminismError when other bytes come out.
        """
        with _record_lock(record.path, shared=False):
            if self.missing(record):
                with self.store.staged() as stage:
                    self.rebuild(record, stage / "made")
                    point("recipe.before_place")
                    for name in record.droppable:
                        (stage / "made" / name).replace(record.path / name)
                        point("recipe.after_place")
        self.touch(record)
        self.trim(record)

    def rebuild(self, record: Record, out: Path) -> None:
        """Make a merge again in the new directory `out`, from the nearest weights that are there.

        A fold needs the fold before it, and so on: what lies between is made one after another and removed again.
        """
        if record.held == "packed":
            self._unpack(record, out)
            return
        if record.held == "adapter":
            self._adapt(record, out)
            return
        chain = [record]
        while (before := self._dropped_input(chain[-1])) is not None:
            chain.append(before)
        running: Path | None = None
        for link in reversed(chain):
            place = out if link is record else out.with_name(f"{out.name}.{link.fingerprint[:DIGITS]}")
            self._merge(link, running, place)
            if running is not None:
                shutil.rmtree(running)
            running = place

    def missing(self, record: Record) -> list[str]:
        """Weights of a recipe that are not there, or are there with another size."""
        found = []
        for name in record.droppable:
            try:
                size = (record.path / name).stat().st_size
            except OSError:
                size = -1
            if size != record.files[name]["bytes"]:
                found.append(name)
        return found

    def problems(self) -> list[str]:
        """What is wrong with recipes, packed weights and adapters, found by making all of them again; nothing is kept of that."""
        found = []
        for record in (*self.store.records(MergeSpec.kind), *self.store.records(TrainSpec.kind)):
            if record.is_made:
                try:
                    with self.store.staged() as stage:
                        self.rebuild(record, stage / "made")
                except (StoreError, UserError) as error:
                    found.append(f"{record.path} cannot be made again: {error}")
        return found

    def touch(self, record: Record) -> None:
        """A recipe whose weights are there is used now: it goes last when room is wanted."""
        marker = self._marker(record)
        marker.parent.mkdir(exist_ok=True)
        marker.touch()

    def trim(self, keep: Record) -> None:
        """Drop made weights, those unused for longest first, until they fit `cache_bytes`; `keep` and what is in use stay."""
        made = []
        for marker in (self.store.root / CACHE).glob("*"):
            record = self.store.find(marker.name)
            if record is None or not record.is_made:
                marker.unlink(missing_ok=True)
                continue
            with contextlib.suppress(OSError):
                made.append((marker.stat().st_mtime_ns, record))
        total = sum(record.bytes for _, record in made)
        for _, record in sorted(made, key=lambda one: one[0]):
            if total <= self.store.cache_bytes:
                return
            if record.fingerprint != keep.fingerprint:
                with _record_lock(record.path, shared=False, wait=0.0) as held:
                    if held:
                        _remove_weights(record)
                        self._marker(record).unlink(missing_ok=True)
                        total -= record.bytes

    def _give_up(self, record: Record, held: Held) -> str | None:
        """Remove weights that can be made; returns why they stay, None if they went."""
        with _record_lock(record.path, shared=False, wait=0.0) as locked:
            if not locked:
                return IN_USE
            current = read_record(record.path)
            if not current.is_made:
                self._write(replace(current, held=held), "recipe.before_record")
            point("recipe.after_record")
            _remove_weights(current)
            self._marker(current).unlink(missing_ok=True)
        return None

    def _write_packed(self, record: Record, base: Record) -> str | None:
        """Write the difference beside the weights; returns why it is not used."""
        from merge_service.checkpoints import pack, unpack

        (name,), (other,) = record.droppable, base.droppable
        with contextlib.ExitStack() as held, self.store.staged() as stage:
            weights, before = self.opened(record, held) / name, self.opened(base, held) / other
            pack(weights, before, stage / "packed")
            if unpack(stage / "packed", before, Path(os.devnull)) != record.sha256(name):
                return "what was packed does not unpack to the same bytes"
            if (stage / "packed").stat().st_size >= record.files[name]["bytes"]:
                return "its difference from the base is no smaller"
            sync_file(stage / "packed")
            (stage / "packed").replace(record.path / f"{PACKED}{base.fingerprint}")
            sync_directory(record.path)
        return None

    def _unpack(self, record: Record, out: Path) -> None:
        """Make packed weights into the new directory `out`."""
        from merge_service.checkpoints import unpack

        packed = next(record.path.glob(f"{PACKED}*"), None)
        if packed is None:
            raise CorruptArtifact(f"{record.path}: its weights are packed, and the packed file is gone")
        (name,), base = record.droppable, self._input(record, "base", packed.name.removeprefix(PACKED))
        out.mkdir()
        with contextlib.ExitStack() as held:
            try:
                found = unpack(packed, self.opened(base, held) / base.droppable[0], out / name)
            except CheckpointError as error:
                raise CorruptArtifact(f"{record.path}: {error}") from error
        if found != record.sha256(name):
            raise CorruptArtifact(
                f"{record.path}: its packed weights are damaged: {packed} holds those of another expert"
            )

    def _adapt(self, record: Record, out: Path) -> None:
        """Make the weights of an expert, of those that its training began with and its adapter, into the new directory `out`."""
        from merge_service.checkpoints import ADAPTER_FOLDER, write_adapted

        (name,), init = record.droppable, self._input(record, "init", record.inputs["init"])
        out.mkdir()
        with contextlib.ExitStack() as held:
            before = self.opened(init, held) / init.droppable[0]
            try:
                write_adapted(before, record.path / ADAPTER_FOLDER, out / name)
            except CheckpointError as error:
                raise CorruptArtifact(f"{record.path}: {error}") from error
        problem = difference(out, name, record.files[name])
        if problem is not None:
            raise CorruptArtifact(
                f"{record.path}: its adapter is damaged: with {before} it makes other weights"
            )

    def _write(self, record: Record, before: str) -> None:
        """Replace the record of an artifact."""
        room, name = self.store.root / ".stage", f"record.{owner_mark()}.{uuid.uuid4().hex[:8]}"
        write_record(record, room, name)
        point(before)
        (room / name).replace(record.path / RECORD_FILE)
        sync_directory(record.path)

    def _merge(self, record: Record, running: Path | None, out: Path) -> None:
        """One merge into `out`, checked against its record and not synced.

        `running` is the model before it where that was made just now.
        """
        from merge_service.checkpoints import WEIGHTS_FILE
        from merge_service.engine import Execution
        from merge_service.merging import Derivation, Operator, Out, Rules, Way, members_of, merge_all

        spec, sha256, paths = MergeSpec.of(record.spec), dict[str, str](), list[Path]()
        with contextlib.ExitStack() as held:
            for name, source in spec.members:
                found = self._input(record, name, source)
                sha256[name] = found.sha256(WEIGHTS_FILE) or ""
                is_made = not paths and running is not None
                paths.append(running if is_made and running else self.opened(found, held))
            base = self.opened(self._input(record, "base", spec.base), held)
            operator = Operator.of(spec.technique, spec.params, "fold" if spec.form == "fold" else "merge")
            way = Way(Execution(os.cpu_count() or 1), Rules(any_base=True), durable=False)
            made = merge_all(
                Derivation(operator, base, members_of(paths, [name for name, _ in spec.members], sha256)),
                Out(out, hashed=True),
                way,
            )
        wrong = [name for name in record.droppable if made.sha256.get(name) != record.sha256(name)]
        if wrong:
            kept = self.store.root / ".conflicts" / f"{record.path.name}.{uuid.uuid4().hex[:8]}"
            kept.parent.mkdir(exist_ok=True)
            shutil.move(out, kept)
            versions = ", ".join(f"{name} {found}" for name, found in record.versions.items())
            raise NondeterminismError(
                f"{record.path}: made again, {', '.join(wrong)} has other bytes than its record states; what came out is kept at "
                f"{kept}. The record was made by {versions}; here is {', '.join(f'{n} {v}' for n, v in here().items())}",
                str(record.path),
                str(kept),
            )

    def _dropped_input(self, record: Record) -> Record | None:
        """The running model that a fold takes in, where that is a recipe without its weights."""
        spec = MergeSpec.of(record.spec)
        if spec.form != "fold" or not spec.members:
            return None
        found = self.store.find(spec.members[0][1])
        return found if found is not None and found.is_recipe and self.missing(found) else None

    def _input(self, record: Record, role: str, fingerprint: str) -> Record:
        found = self.store.find(fingerprint)
        if found is None:
            raise CorruptArtifact(
                f"{record.path} needs {role} ({fingerprint[:DIGITS]}) to make its weights, which is not in the store; run again"
            )
        return found

    def _marker(self, record: Record) -> Path:
        return self.store.root / CACHE / record.fingerprint


def not_portable(step: Described) -> str | None:
    """Why a step's weights cannot be made again anywhere from its spec; None if they can."""
    from merge_service.techniques import get

    if step.kind != MergeSpec.kind:
        return f"only merges can be made again, not a {step.kind} step"
    spec = MergeSpec.of(step.spec)
    if spec.source is not None:
        return f"{spec.technique} is not one of ours: its code may not be there when the weights are wanted"
    if spec.statistics:
        return f"{spec.technique} reads statistics, which may not be there when the weights are wanted"
    if not get(spec.technique).portable:
        return f"{spec.technique} takes singular vectors, whose last bits differ between linear algebra libraries"
    return None


def _remove_weights(record: Record) -> None:
    for name in record.droppable:
        (record.path / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _record_lock(directory: Path, shared: bool, wait: float = WAIT_SECONDS) -> Iterator[bool]:
    """Hold the lock of an artifact's record; False where it cannot be had within `wait` seconds, or there are no locks.

    The record may be replaced while the lock is waited for, so the locked file must still be the one under its name.
    """
    path, until = directory / RECORD_FILE, time.monotonic() + wait
    while True:
        with file_lock(path, shared=shared, until=until) as handle:
            if handle is None or os.path.samestat(path.stat(), os.fstat(handle)):
                yield handle is not None
                return
