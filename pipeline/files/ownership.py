"""Who is writing here: locks and owner marks that outlive no process.

Invariant: what a dead process of this host held is free at once; what a live one holds is never taken from it. Owners on
other hosts cannot be asked, so theirs is left alone until it is old.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from merge_service.files import is_abandoned, owner_mark
from pipeline.errors import StoreError
from pipeline.files.disk import NO_LOCKS

__all__ = ["file_lock", "is_abandoned", "locked", "owner_mark"]


@contextlib.contextmanager
def locked(path: Path, deadline: float = 60.0) -> Iterator[None]:
    """Hold an exclusive advisory lock on `path`; it dies with the process. Raises StoreError after `deadline` seconds.

    Where the file system has no locks the block runs without: callers stay safe, they lose only the tidy order.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _acquire(handle, path, time.monotonic() + deadline)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def file_lock(path: Path, *, shared: bool, until: float) -> Iterator[int | None]:
    """Hold an advisory lock on an existing file, which may be read-only: its descriptor, or None.

    None means that the lock could not be had before the time `until` (of `time.monotonic`), or that the file system has no locks.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield handle if _try_until(handle, shared, until) else None
    finally:
        os.close(handle)


def _try_until(handle: int, shared: bool, until: float) -> bool:
    while True:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.01)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return False
            raise


def _acquire(handle: int, path: Path, until: float) -> None:
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise StoreError(
                    f"{path} is held by another process that does not move; end it and run again"
                ) from None
            time.sleep(0.005)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return
            raise
