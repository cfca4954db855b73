"""One driver per OUT: a lock that dies with its holder, and a small file that says who it is and what it does.

Invariant: whoever holds the lock is alive. `driver.json` is only information; the lock decides.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from merge_service.errors import UserError
from pipeline.errors import StorageFull, StoreUnwritable
from pipeline.files.disk import NO_LOCKS, clear_leftovers, room_for, write_whole

LOCK_FILE, DRIVER_FILE = ".driver.lock", "driver.json"
LOOKS = 20


class AlreadyRunning(UserError):
    """Another driver works on the same OUT."""


class NoLocks(UserError):
    """OUT is on a file system that has no file locks, so two drivers could work there without knowing of each other."""


@contextlib.contextmanager
def driver_lock(out: Path) -> Iterator[None]:
    """Hold OUT for this process. Raises AlreadyRunning, NoLocks, StorageFull, StoreUnwritable."""
    try:
        with room_for(f"OUT {out}", out):
            out.mkdir(parents=True, exist_ok=True)
            handle = os.open(out / LOCK_FILE, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
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
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise NoLocks(
                f"{out} is on a file system without file locks ({error.strerror}): nothing would keep two drivers apart there. "
                "Mount it with locks (Lustre: -o flock; NFS: version 4, or 3 with lockd), or choose another --out; "
                "storage.store may stay where it is, a store needs no locks"
            ) from error
        clear_leftovers(out / DRIVER_FILE)
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
    """Whether a driver is working on OUT now; none does where the file system has no locks (`NoLocks`)."""
    try:
        handle = os.open(out / LOCK_FILE, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        if isinstance(error, BlockingIOError):
            return True
        raise
    else:
        return False
    finally:
        os.close(handle)


def write_driver(out: Path, state: dict[str, Any]) -> None:
    """Say who drives and what is running or failed; replaced as a whole. Raises StorageFull."""
    write_whole(out / DRIVER_FILE, _driver_text(state))


def _driver_text(state: dict[str, Any]) -> str:
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), **state})


def write_last(out: Path, state: dict[str, Any]) -> None:
    """As `write_driver`, when the run ends: on a full disk over the old words, which takes no new room. Best effort."""
    try:
        write_driver(out, state)
    except OSError:
        pass
    except StorageFull:
        with contextlib.suppress(OSError):
            (out / DRIVER_FILE).write_text(_driver_text(state), encoding="utf-8")


def read_driver(out: Path) -> dict[str, Any]:
    """What `write_driver` last wrote; empty if nothing readable is there."""
    try:
        answer = json.loads((out / DRIVER_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return answer if isinstance(answer, dict) else {}
