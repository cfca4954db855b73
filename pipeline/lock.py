"""One driver per OUT: a lock that dies with its holder, and a small file that says who it is and what it does.

Invariant: whoever holds the lock is alive. `driver.json` is only information; the lock decides.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merge_service.errors import UserError
from pipeline.errors import StoreUnwritable

LOCK_FILE, DRIVER_FILE = ".driver.lock", "driver.json"
LOOKS = 20


class AlreadyRunning(UserError):
    """Another driver works on the same OUT."""


@contextmanager
def driver_lock(out: Path) -> Iterator[None]:
    """Hold OUT for this process. Raises AlreadyRunning, StoreUnwritable."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out / LOCK_FILE, os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise StoreUnwritable(
            f"{out} cannot be written ({error.strerror or error}); choose another --out or mend it"
        ) from error
    try:
        try:
            _take(handle)
        except BlockingIOError:
            who = read_driver(out)
            raise AlreadyRunning(
                f"{out} is being worked on by process {who.get('pid', '?')} on {who.get('host', '?')}; wait for it, watch it with "
                f"`temporal-merge status {out}`, or choose another --out"
            ) from None
        write_driver(out, {})
        yield
    finally:
        os.close(handle)


def _take(handle: int) -> None:
    """Lock, or raise BlockingIOError; somebody who only looks (`is_held`) has it for an instant and is waited for."""
    for _ in range(LOOKS):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.01)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_held(out: Path) -> bool:
    """Whether a driver is working on OUT now."""
    try:
        handle = os.open(out / LOCK_FILE, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(handle)


def write_driver(out: Path, state: dict[str, Any]) -> None:
    """Say who drives and what is running or failed; replaced as a whole."""
    path = out / DRIVER_FILE
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), **state}))
    temporary.replace(path)


def read_driver(out: Path) -> dict[str, Any]:
    """What `write_driver` last wrote; empty if nothing readable is there."""
    try:
        answer = json.loads((out / DRIVER_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return answer if isinstance(answer, dict) else {}
