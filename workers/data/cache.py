"""Cache entries on disk: what was computed from a data root, kept for all users who may read that root.

One user writes an entry and many read it. So an entry has the permissions of its source data, whatever the umask: users who can read
the data can read the entry, and nobody else can. Small entries are optional; a cache that cannot be written costs time and changes
no result. A folder is filled beside its final place and then renamed.
Invariant: an entry is complete on disk or absent, also after a crash of the machine.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from merge_service.files import sync_directory

PARTIAL = ".partial-"
ENTRY_FILE = "entry.json"
"""The file of an entry that states the sha256 of the other files."""


class Unusable(Exception):
    """An entry that is missing, or whose bytes have changed since it was written."""


def file_sha256(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_entry(place: Path, files: Sequence[str]) -> None:
    """Raise Unusable unless these files of an entry have the sha256 stated in `ENTRY_FILE`."""
    try:
        if not place.is_dir():
            raise Unusable("the entry is missing")
        stated = json.loads((place / ENTRY_FILE).read_text(encoding="utf-8"))
        for name in files:
            if file_sha256(place / name) != stated[name]:
                raise Unusable(f"the bytes of {name} have changed since it was written")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Unusable(f"the entry cannot be read ({error})") from None


def make_entry(
    place: Path, access: "Access", files: Sequence[str], fill: Callable[[Path], None], again: str
) -> None:
    """Create the entry `place` from the `files` that `fill` writes into a folder; do nothing if another process has created it.

    A damaged entry is removed first, with a message that ends in `again`. Raises OSError, and what `fill` raises.
    """
    with only_one(place, access):
        try:
            check_entry(place, files)
            return
        except Unusable as problem:
            if place.exists():
                print(f"{place}: {problem}; {again}", file=sys.stderr, flush=True)
                worthless = place.with_name(f"{place.name}{PARTIAL}damaged")
                place.rename(worthless)
                shutil.rmtree(worthless, ignore_errors=True)
        with whole_folder(place, access) as work:
            fill(work)
            digests = {name: file_sha256(work / name) for name in files}
            (work / ENTRY_FILE).write_text(json.dumps(digests), encoding="utf-8")


@dataclass(frozen=True)
class Access:
    """Permissions of an entry: the `mode` bits of its folder and the `group` that they apply to.

    `shared` are the mode bits of folders that hold entries of all datasets of a root.
    """

    mode: int
    group: int
    shared: int

    @classmethod
    def of(cls, root: Path, *within: Path) -> "Access":
        """The permissions that a root and every path of `within` have in common; the entry is made from these paths."""
        state = root.stat()
        shared = mode = state.st_mode & 0o777 | 0o700
        for path in within:
            inner = path.stat()
            mode &= inner.st_mode | (0o111 if path.is_file() else 0)
            if inner.st_gid != state.st_gid:
                mode = _without_group(mode)
        return cls(mode | 0o700, state.st_gid, shared)

    def grant(self, path: Path, shared: bool = False) -> None:
        """Set these permissions on a file or folder. If its group cannot be set, the group bits become those of others."""
        mode = self.shared if shared else self.mode
        if path.stat().st_gid != self.group:
            try:
                os.chown(path, -1, self.group)
            except OSError:
                mode = _without_group(mode)
        path.chmod(mode if path.is_dir() else mode & 0o666)


def _without_group(mode: int) -> int:
    """Mode bits whose group part equals the part of others."""
    return mode & ~0o070 | (mode & 0o007) << 3


def cache_root(cache: str | Path | None = None) -> Path:
    """The cache directory: `cache`, else $TEMPORAL_MERGE_CACHE, else ~/.cache/temporal-merge."""
    if cache is not None:
        return Path(cache)
    return Path(os.environ.get("TEMPORAL_MERGE_CACHE") or Path.home() / ".cache" / "temporal-merge")


def is_writable(folder: Path) -> bool:
    """Whether files can be created in a folder, or the folder itself. Only permissions are checked; nothing is written."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def make_folder(folder: Path, access: Access) -> None:
    """Create the folder and its missing parents, each with the permissions of the root. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        with suppress(FileExistsError):  # another process created it and sets its permissions
            path.mkdir()
            access.grant(path, shared=True)


def recall(path: Path) -> str | None:
    """The text in a file of the cache; None if this user cannot read it as text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def remember(path: Path, content: str | bytes, access: Access) -> None:
    """Write a file of the cache, if the cache can be written; otherwise its content is computed again next time."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with suppress(OSError):
        make_folder(path.parent, access)
        try:
            partial.write_bytes(content if isinstance(content, bytes) else content.encode())
            access.grant(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def only_one(place: Path, access: Access) -> Iterator[None]:
    """Let one process at a time create `place`, and remove partial folders of processes that were interrupted.

    On a file system without locks, every process creates its own and the first rename wins. Raises OSError if the folder cannot be
    written.
    """
    make_folder(place.parent, access)
    lock = _lock_file(place)
    fresh = not lock.exists()
    with lock.open("a") as handle:
        if fresh:
            with suppress(OSError):  # another process owns it by now
                access.grant(lock, shared=True)
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
            _sweep(place)
        yield


@contextmanager
def whole_folder(place: Path, access: Access) -> Iterator[Path]:
    """A folder to fill, synced to disk and renamed to `place` at the end of the block. Used within `only_one`. Raises OSError."""
    work = Path(tempfile.mkdtemp(prefix=f"{place.name}{PARTIAL}", dir=place.parent))
    try:
        yield work
        for path in sorted(work.iterdir()):
            access.grant(path)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        access.grant(work)
        sync_directory(work)
        try:
            work.rename(place)
        except OSError:
            if not place.is_dir():  # else another process was first
                raise
        sync_directory(place.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _lock_file(place: Path) -> Path:
    return place.with_name(f".{place.name}.lock")


def _sweep(place: Path) -> None:
    """Remove the partial folders beside `place` whose processes have ended. A process holds the lock of the entry it creates."""
    for work in place.parent.glob(f"*{PARTIAL}*"):
        made = work.with_name(work.name.rsplit(PARTIAL, 1)[0])
        if made == place:
            shutil.rmtree(work, ignore_errors=True)
            continue
        with suppress(OSError), ExitStack() as stack:
            if _lock_file(made).exists():
                handle = stack.enter_context(_lock_file(made).open("a"))
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(work, ignore_errors=True)
