"""The data cache: what was found out about a data root once, kept for all who may read that root.

One user writes, many read. Entries have the permissions of the data that they were made from, whatever the umask, so that
who can read the data can read the cache, and nobody else. Small things are kept if they can be (a cache that cannot be
written costs time, never a result); folders are made beside their place and renamed into it.
Invariant: an entry is whole on the disk or absent, also after a crash of the machine.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from merge_service.files import sync_directory

PARTIAL = ".partial-"


@dataclass(frozen=True)
class Access:
    """Who may use an entry: permission bits of a folder, and the group they are for.

    `shared` are those of the folders that hold the entries of all datasets of a root.
    """

    mode: int
    group: int
    shared: int

    @classmethod
    def of(cls, root: Path, *within: Path) -> "Access":
        """What a root and the files and folders within it, from which an entry is made, grant alike."""
        state = root.stat()
        shared = mode = state.st_mode & 0o777 | 0o700
        for path in within:
            inner = path.stat()
            mode &= inner.st_mode | (0o111 if path.is_file() else 0)
            if inner.st_gid != state.st_gid:
                mode = _without_group(mode)
        return cls(mode | 0o700, state.st_gid, shared)

    def grant(self, path: Path, shared: bool = False) -> None:
        """Give a file or folder of ours these permissions. Where the group cannot be had, it gets what everybody gets."""
        mode = self.shared if shared else self.mode
        if path.stat().st_gid != self.group:
            try:
                os.chown(path, -1, self.group)
            except OSError:
                mode = _without_group(mode)
        path.chmod(mode if path.is_dir() else mode & 0o666)


def _without_group(mode: int) -> int:
    """The group gets what everybody gets."""
    return mode & ~0o070 | (mode & 0o007) << 3


def cache_root(cache: str | Path | None = None) -> Path:
    """Where things are kept: `cache`, else what the environment says, else the user's own cache."""
    if cache is not None:
        return Path(cache)
    return Path(os.environ.get("TEMPORAL_MERGE_CACHE") or Path.home() / ".cache" / "temporal-merge")


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or the folder itself be made. Permissions are asked for, nothing is written."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def make_folder(folder: Path, access: Access) -> None:
    """The folder and its missing parents, each with the root's permissions. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        with suppress(FileExistsError):  # another process was faster: it is theirs to open
            path.mkdir()
            access.grant(path, shared=True)


def recall(path: Path) -> str | None:
    """The text kept under a path; None if there is none that this user can read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def remember(path: Path, content: str | bytes, access: Access) -> None:
    """Keep a text or bytes under a path if the cache can be written; else it is found out again next time."""
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
    """Let one process at a time make `place`, and remove what processes left that ended in the middle of making something.

    Where the file system has no locks, all make it and the first to rename wins. Raises OSError if the folder cannot be written.
    """
    make_folder(place.parent, access)
    lock = _lock_file(place)
    fresh = not lock.exists()
    with lock.open("a") as handle:
        if fresh:
            with suppress(OSError):  # somebody else's by now
                access.grant(lock, shared=True)
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
            _sweep(place)
        yield


@contextmanager
def whole_folder(place: Path, access: Access) -> Iterator[Path]:
    """A folder to fill, which then becomes `place` with all its files on the disk. Under `only_one`. Raises OSError."""
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
            if not place.is_dir():  # else somebody else was first
                raise
        sync_directory(place.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _lock_file(place: Path) -> Path:
    return place.with_name(f".{place.name}.lock")


def _sweep(place: Path) -> None:
    """Remove the partial folders beside `place` whose makers are gone: a maker holds the lock of what it makes."""
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
