"""The index from fingerprints to directories, so that finding one artifact does not list the others.

`ROOT/.names/<first 16 digits>` holds `<kind>/<directory>`. It is written before the artifact gets its name, never
changes while it can be read, and counts only if that directory exists.
Invariant: two writers of one step agree on one directory even without locks, because the file is created exclusively. A
store without an index (from an older version) reads the same, only slower, until its first write.
"""

import errno
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from merge_service.files import sync_directory
from pipeline.errors import StoreError
from pipeline.files.ownership import owner_mark
from pipeline.kinds.table import KINDS

DIGITS = 16
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES}

_older: dict[Path, dict[str, str]] = {}


@dataclass(frozen=True)
class Names:
    """The index of the store at `root`."""

    root: Path

    @property
    def room(self) -> Path:
        return self.root / ".names"

    def find(self, digits: str) -> Path | None:
        """The directory of an artifact, None if it does not exist now. Raises StoreError if the disk does not answer."""
        name = self._name(digits)
        return self.root / name if name is not None and is_there(self.root / name) else None

    def claim(self, kind: str, digits: str, slug: str) -> Path:
        """The directory for the artifact of this step: the first caller sets its slug, for all."""
        if not self.room.is_dir():
            self.complete()
        wanted = f"{kind}/{slug}-{digits}"
        temporary = self.root / ".stage" / f"name.{owner_mark()}.{uuid.uuid4().hex[:8]}"
        temporary.parent.mkdir(exist_ok=True)
        if self._name(digits) is None:
            try:
                _write(temporary, wanted)
                self._publish(temporary, digits)
            finally:
                temporary.unlink(missing_ok=True)
            sync_directory(self.room)
        return self.root / (self._name(digits) or wanted)

    def _publish(self, temporary: Path, digits: str) -> None:
        """Publish a written file as the entry, unless another writer was first; a damaged entry is replaced."""
        try:
            os.link(temporary, self.room / digits)
        except OSError as error:
            taken = isinstance(error, FileExistsError)
            if error.errno in _NO_LINKS or (taken and not self._name(digits)):
                temporary.replace(self.room / digits)
            elif not taken:
                raise

    def complete(self) -> None:
        """Add an entry for every artifact that has none: in a store of an older version, or copied in by hand."""
        room = (
            self.room
            if self.room.is_dir()
            else self.root / ".stage" / f"names.{owner_mark()}.{uuid.uuid4().hex[:8]}"
        )
        room.mkdir(parents=True, exist_ok=True)
        with os.scandir(room) as entries:
            named = {entry.name for entry in entries if entry.stat().st_size}
        for digits, name in self._scan().items():
            if digits not in named:
                temporary = self.root / ".stage" / f"name.{owner_mark()}.{uuid.uuid4().hex[:8]}"
                temporary.write_text(name)
                temporary.replace(room / digits)
        if room != self.room:
            try:
                room.rename(self.room)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise

    def _name(self, digits: str) -> str | None:
        """`kind/directory` as the entry says, or from a scan of all directories if there is no index or the entry is damaged."""
        try:
            # Opening makes a network file system ask its server; a plain lookup may use an old cache.
            room = os.open(self.room, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            _raise_unless_absent(error, self.room)
            if self.root not in _older:
                _older[self.root] = self._scan()
            return _older[self.root].get(digits)
        try:
            handle = os.open(digits, os.O_RDONLY, dir_fd=room)
        except OSError as error:
            _raise_unless_absent(error, self.room / digits)
            return None
        finally:
            os.close(room)
        try:
            name = os.read(handle, 1024).decode("utf-8", "replace")
        finally:
            os.close(handle)
        return name if _is_name(name, digits) else self._scan().get(digits)

    def _scan(self) -> dict[str, str]:
        """Entries of all artifacts by their digits, read from the directories themselves."""
        found: dict[str, str] = {}
        for kind in reversed(KINDS):
            try:
                names = sorted((path.name for path in (self.root / kind).iterdir()), reverse=True)
            except OSError as error:
                _raise_unless_absent(error, self.root / kind)
                continue
            found |= {name.rpartition("-")[2]: f"{kind}/{name}" for name in names if not name.startswith(".")}
        return found


def stage_name(kind: str, fingerprint: str) -> str:
    """What the names of a step's staging directories begin with."""
    return f"{kind}-{fingerprint[:DIGITS]}"


def is_there(path: Path) -> bool:
    """Whether a directory exists now, according to the server of a network file system."""
    try:
        parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        _raise_unless_absent(error, path.parent)
        return False
    try:
        os.stat(path.name, dir_fd=parent)
    except OSError as error:
        _raise_unless_absent(error, path)
        return False
    finally:
        os.close(parent)
    return True


def _is_name(text: str, digits: str) -> bool:
    kind, _, directory = text.partition("/")
    return kind in KINDS and "/" not in directory and "\0" not in text and directory.endswith(f"-{digits}")


def _write(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _raise_unless_absent(error: OSError, path: Path) -> None:
    if error.errno not in _ABSENT:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from error
