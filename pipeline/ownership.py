"""Who is writing here: locks and owner marks that outlive no process.

Invariant: what a dead process of this host held is free at once; what a live one holds is never taken from it. Owners on
other hosts cannot be asked, so theirs is left alone until it is old.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from pipeline.errors import StoreError

_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS}
_FOREIGN_AGE = 7 * 24 * 3600.0


def owner_mark() -> str:
    """Text naming this process for good: host, process id, and when the process began (so that a reused id differs)."""
    pid = os.getpid()
    return f"{_host()}-{pid}-{_started(pid) or 0}"


def is_abandoned(mark: str, age: float) -> bool:
    """Whether the owner of a mark `age` seconds old is gone: dead on this host, or elsewhere and silent for a week."""
    host, _, rest = mark.partition("-")
    pid, _, started = rest.partition("-")
    if host != _host() or not pid.isdigit() or not started.isdigit():
        return age > _FOREIGN_AGE
    return _started(int(pid)) != int(started)


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
            if error.errno in _UNSUPPORTED:
                return
            raise


@cache
def _host() -> str:
    """Name of this host, boot and process-id namespace: two processes with the same text can see each other's ids."""
    parts = [socket.gethostname()]
    for source in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            path = Path(source)
            parts.append(str(path.readlink()) if path.is_symlink() else path.read_text().strip())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _started(pid: int) -> int | None:
    """Start time of a live process in clock ticks since boot, 0 where /proc does not say, None if it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0
