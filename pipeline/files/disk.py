"""Small files of OUT and of the store, and what is said when a disk is full or has no locks.

Invariant: a file written here is there whole under its name or not at all, and nothing of a failed attempt is left; a full disk
is a `StorageFull` with the bytes that are free, wherever in the pipeline it is noticed.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from merge_service.files import replace_whole, sweep
from pipeline.errors import StorageFull, StoreError, StoreUnwritable

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS})
"""What `flock` answers on a file system that has no locks (Lustre without `flock`, some FUSE and NFS mounts)."""
_UNWRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST})
_FULL_TEXTS = ("No space left on device", "database or disk is full")


def write_whole(path: Path, pieces: str | Iterable[str], *, sync: bool = False) -> None:
    """Replace a file by a text, or by the pieces of one as they come; `sync` forces it to disk first.

    Raises StorageFull, OSError.
    """
    with room_for(path.name, path.parent):
        replace_whole(path, pieces, sync=sync)


def clear_leftovers(*paths: Path) -> None:
    """Remove what writers of these files that died on the way have left beside them."""
    for path in paths:
        sweep(path)


@contextlib.contextmanager
def room_for(what: str, place: Path, needed: int = 0) -> Iterator[None]:
    """Turn a full disk, noticed in this block, into StorageFull; every other error passes as it is."""
    try:
        yield
    except Exception as error:
        if isinstance(error, StorageFull) or not is_full(error):
            raise
        free = free_bytes(place)
        raise StorageFull(full_text(what, place, needed, free), needed, free) from error


def unwritable(error: OSError, place: Path) -> StoreUnwritable | None:
    """The error to raise instead, where a place that may not be written is what an error is about."""
    if error.errno not in _UNWRITABLE:
        return None
    reason = error.strerror or str(error)
    return StoreUnwritable(f"{place} cannot be written ({reason}); choose another --out or make it writable")


@contextlib.contextmanager
def written_below(place: Path, what: str) -> Iterator[None]:
    """Turn errors of this block about a full disk, or a `place` that may not be written, into StorageFull and StoreUnwritable."""
    with room_for(what, place):
        try:
            yield
        except OSError as error:
            if (refused := unwritable(error, place)) is None:
                raise
            raise refused from error


def is_full(error: BaseException | None) -> bool:
    """Whether a full disk is what an error, or whatever it came from, is about."""
    for one in _origins(error):
        if isinstance(one, OSError) and one.errno in FULL:
            return True
        if not isinstance(one, StoreError) and any(text in str(one) for text in _FULL_TEXTS):
            return True
    return False


def full_text(what: str, place: Path | str, needed: int, free: int) -> str:
    """The message of a StorageFull."""
    wanted = f"{needed:,} bytes are needed, {free:,} are free" if needed else f"{free:,} bytes are free"
    return f"{what}: no room in {place}: {wanted}. Free some space and run again; finished steps are kept"


def free_bytes(place: Path) -> int:
    """Bytes that are free where `place` is, or will be."""
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def explain(error: BaseException | None) -> str | None:
    """What to change when the machine, not the study, is what an error came from; None if it is none of these."""
    texts = (_too_many(one) or _not_writable(one) for one in _origins(error) if isinstance(one, OSError))
    return next(filter(None, texts), None)


def _origins(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it came from, and so on, eight at most."""
    for _ in range(8):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _too_many(error: OSError) -> str | None:
    import resource

    if error.errno == errno.EMFILE:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
        how = (
            f"ulimit -n {wanted}"
            if wanted > soft
            else "its hard limit too, where the machine sets it (limits.conf, LimitNOFILE of a service, --ulimit of a container)"
        )
        return f"too many open files: this process may have {soft:,} at a time. Raise that and run the same command again: {how}"
    if error.errno == errno.ENFILE:
        return "too many open files on this machine (fs.file-max): end what else holds files, and run the same command again"
    return None


def _not_writable(error: OSError) -> str | None:
    """A cache or a temporary file that has no place: below HOME, or below TMPDIR."""
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT):
        return None
    if not error.filename or not isinstance(error.filename, str | os.PathLike):
        return None
    path, reason = Path(error.filename).absolute(), error.strerror or str(error)
    for variable, also in _VARIABLES.items():
        value = os.environ.get(variable)
        if error.errno == errno.ENOENT and value and Path(value).exists():
            continue  # something that is missing there, not a place that cannot be written
        if value and path.is_relative_to(Path(value).absolute()) and not os.access(value, os.W_OK):
            return f"{variable}={value} cannot be written ({path}: {reason}); set {also}"
    return None


_VARIABLES = {
    "HF_HOME": "HF_HOME to a directory that you may write",
    "XDG_CACHE_HOME": "XDG_CACHE_HOME to a directory that you may write",
    "TMPDIR": "TMPDIR to a directory that you may write",
    "HOME": "HOME to a directory that you may write, or HF_HOME (models of the Hub), XDG_CACHE_HOME (decoded images; "
    "data.cache in a study) and NUMBA_CACHE_DIR each to one",
}
