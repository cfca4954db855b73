"""Housekeeping of a store: which studies refer to it, what it contains, and how artifacts are removed.

Invariant: a removed artifact stops being one in a single act (a rename, or the removal of its record) before its bytes
are deleted, so a crash leaves artifacts whole or absent. Registrations are written and artifacts removed under one
lock.
"""

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from merge_service.files import sync_directory
from pipeline.errors import StoreError
from pipeline.files.ownership import is_abandoned, locked, owner_mark
from pipeline.kinds.table import KINDS
from pipeline.store.artifact import RECORD_FILE
from pipeline.store.local import Store
from pipeline.store.names import DIGITS

ASIDE = (".corrupt", ".conflicts")
_WAIT_SECONDS, _LEASE_SECONDS = 120.0, 900.0


@dataclass(frozen=True)
class Entry:
    """An item under a kind: an artifact, whole or damaged, or (`made_ms` None) files without a record.

    `bytes` become free when the item is deleted. `linked` bytes do not, because hard links hold them, as those of
    MLflow's artifacts do.
    """

    kind: str
    digits: str
    place: str
    bytes: int
    made_ms: int | None
    linked: int = 0


class Upkeep:
    """Housekeeping of a store in a directory."""

    def __init__(self, store: Store) -> None:
        self.store, self.root = store, store.root

    def exclusively(self) -> contextlib.AbstractContextManager[None]:
        """The lock under which studies register and artifacts are removed. Raises StoreError if it stays held."""
        self.root.mkdir(parents=True, exist_ok=True)
        return locked(self.root / ".lock", _WAIT_SECONDS)

    def notes(self) -> dict[str, bytes]:
        """The registrations by name."""
        return {path.stem: path.read_bytes() for path in sorted((self.root / ".studies").glob("*.json"))}

    def write_note(self, name: str, text: bytes) -> None:
        (self.root / ".studies").mkdir(exist_ok=True)
        temporary = self.root / ".studies" / f".{name}.{uuid.uuid4().hex[:8]}"
        temporary.write_bytes(text)
        temporary.replace(self.root / ".studies" / f"{name}.json")

    def drop_note(self, name: str) -> None:
        (self.root / ".studies" / f"{name}.json").unlink(missing_ok=True)

    def entries(self) -> Iterator[Entry]:
        """Everything under the kinds."""
        for kind in KINDS:
            for path in sorted((self.root / kind).glob("[!.]*-*")):
                made = path if not (path / RECORD_FILE).is_file() else path / RECORD_FILE
                with contextlib.suppress(FileNotFoundError):
                    stamp = int(made.stat().st_mtime * 1000)
                    freed, linked = sizes_of(path)
                    yield Entry(kind, path.name[-DIGITS:], str(path), freed, stamp, linked)

    def take_out(self, entry: Entry, files_too: bool) -> None:
        """Remove the item from the store; its bytes are deleted by the next `clear`."""
        target = self.root / ".stage" / f"gc.{owner_mark()}.{uuid.uuid4().hex[:8]}"
        target.parent.mkdir(exist_ok=True)
        place = Path(entry.place)
        place.rename(target)
        sync_directory(place.parent)  # before any of its files goes
        (self.root / ".names" / entry.digits).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete the bytes of what this process took out, and what dead writers left."""
        for path in (self.root / ".stage").glob(f"gc.{owner_mark()}.*"):
            shutil.rmtree(path, ignore_errors=True)
        self.store.sweep()

    def aside(self) -> dict[str, int]:
        """Bytes by name of what was moved aside: damaged artifacts and second results."""
        return {
            f"{room}/{path.name}": sizes_of(path)[0]
            for room in ASIDE
            for path in sorted((self.root / room).glob("*"))
        }

    def remove_aside(self, name: str) -> None:
        shutil.rmtree(self.root / name, ignore_errors=True)


class ObjectUpkeep(Upkeep):
    """Housekeeping of a store at a URL, and of this node's mirror of it."""

    def __init__(self, store: Store) -> None:
        from pipeline.store.remote import ObjectStore

        super().__init__(store)
        assert isinstance(store, ObjectStore)
        self.objects = store.objects

    @contextlib.contextmanager
    def exclusively(self) -> Iterator[None]:
        deadline, mine = (
            time.monotonic() + _WAIT_SECONDS,
            json.dumps([owner_mark(), time.time(), uuid.uuid4().hex]).encode(),
        )
        while not self.objects.create(".lock", mine):
            held = self.objects.read(".lock")
            with contextlib.suppress(ValueError, TypeError):
                mark, since, _ = json.loads(held or b"")
                if is_abandoned(mark, time.time() - since) or time.time() - since > _LEASE_SECONDS:
                    self.objects.remove(".lock")
                    continue
            if time.monotonic() > deadline:
                raise StoreError(
                    f"{self.store.where}/.lock is held by another process; end it, or wait and run again"
                )
            time.sleep(0.2)
        try:
            yield
        finally:
            if self.objects.read(".lock") == mine:
                self.objects.remove(".lock")

    def notes(self) -> dict[str, bytes]:
        keys = [key for key in self.objects.sizes(".studies") if key.endswith(".json")]
        found = {Path(key).stem: self.objects.read(key) for key in sorted(keys)}
        return {name: text for name, text in found.items() if text is not None}

    def write_note(self, name: str, text: bytes) -> None:
        self.objects.write(f".studies/{name}.json", text)

    def drop_note(self, name: str) -> None:
        self.objects.remove(f".studies/{name}.json")

    def entries(self) -> Iterator[Entry]:
        for kind in KINDS:
            groups: dict[str, dict[str, int]] = {}
            for key, size in self.objects.sizes(kind).items():
                groups.setdefault("/".join(key.split("/")[:2]), {})[key] = size
            for place, keys in sorted(groups.items()):
                made = self._made(f"{place}/{RECORD_FILE}") if f"{place}/{RECORD_FILE}" in keys else None
                yield Entry(kind, place.split("/")[1][:DIGITS], place, sum(keys.values()), made)

    def take_out(self, entry: Entry, files_too: bool) -> None:
        self.objects.remove(f"{entry.place}/{RECORD_FILE}")
        for key in self.objects.sizes(f"{entry.place}/results"):
            self.objects.remove(key)
        if files_too:
            for key in self.objects.sizes(entry.place):
                self.objects.remove(key)

    def clear(self) -> None:
        """Delete this node's copies of artifacts that no longer exist, and what dead writers left in the mirror."""
        alive = {entry.digits for entry in self.entries() if entry.made_ms is not None}
        for kind in KINDS:
            for path in (self.root / kind).glob("*"):
                if path.name not in alive:
                    shutil.rmtree(path, ignore_errors=True)
        self.store.sweep()

    def aside(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for room in ASIDE:
            for key, size in self.objects.sizes(room).items():
                name = "/".join(key.split("/")[:2])
                found[name] = found.get(name, 0) + size
        return found

    def remove_aside(self, name: str) -> None:
        for key in self.objects.sizes(name):
            self.objects.remove(key)

    def _made(self, key: str) -> int:
        try:
            return int(json.loads(self.objects.read(key) or b"")["created_ms"])
        except (ValueError, KeyError, TypeError):
            return 0


def upkeep(store: Store) -> Upkeep:
    """The housekeeping for the type of a store."""
    return Upkeep(store) if type(store) is Store else ObjectUpkeep(store)


def sizes_of(path: Path) -> tuple[int, int]:
    """Bytes that become free when a file or directory is deleted, and bytes that other hard links hold."""
    places = (
        [path]
        if not path.is_dir() or path.is_symlink()
        else (Path(place) / name for place, _, names in os.walk(path) for name in names)
    )
    freed = linked = 0
    shared: dict[tuple[int, int], list[int]] = {}
    for one in places:
        with contextlib.suppress(OSError):
            found = one.lstat()
            if found.st_nlink == 1:
                freed += found.st_size
            else:
                shared.setdefault((found.st_dev, found.st_ino), [found.st_size, found.st_nlink])[1] -= 1
    for size, elsewhere in shared.values():
        if elsewhere:
            linked += size
        else:
            freed += size
    return freed, linked


def held_elsewhere(linked: int, what: str) -> list[str]:
    """The line that says of `linked` bytes, if any, that other names hold them; `what` says which bytes they are."""
    line = (
        f"{linked:,} bytes {what} stay on the disk: other names hold them (hard links, such as the files of MLflow's "
        "artifacts); they go when those are deleted too"
    )
    return [line] if linked else []
