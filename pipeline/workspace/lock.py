"""One driver per OUT: a lock that the kernel frees when its holder ends, and a file with the state of the driver.

Invariant: a process that holds the lock is alive. `driver.json` is information only; the lock decides.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict, cast

from merge_service.errors import UserError
from pipeline.errors import StorageFull, StoreUnwritable
from pipeline.files.disk import NO_LOCKS, clear_leftovers, room_for, write_whole

LOCK_FILE, DRIVER_FILE = ".driver.lock", "driver.json"
LOOKS = 20


class Running(TypedDict):
    """A step under way; `began` is Unix time in seconds."""

    fingerprint: str
    kind: str
    label: str
    began: float


class Waited(TypedDict):
    """A step that another driver carries out: `holder` says who."""

    fingerprint: str
    label: str
    holder: str


class Failure(TypedDict):
    """What ended a run: the label of a step, or the study's name, and the message."""

    step: str
    error: str


class DriverState(TypedDict, total=False):
    """What `driver.json` says; the file may be of another version, or missing."""

    pid: int
    host: str
    running: list[Running]
    waiting: list[Waited]
    ended: bool
    failed: Failure | None


class AlreadyRunning(UserError):
    """Another driver works on the same OUT."""


class NoLocks(UserError):
    """OUT is on a file system without file locks, so two drivers could work there unnoticed."""


@contextlib.contextmanager
def driver_lock(out: Path) -> Iterator[None]:
    """Lock OUT for this process. Raises AlreadyRunning, NoLocks, StorageFull, StoreUnwritable."""
    try:
        with room_for(f"OUT {out}", out):
            out.mkdir(parents=True, exist_ok=True)
            handle = os.open(out / LOCK_FILE, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise StoreUnwritable(
            f"{out} cannot be written ({error.strerror or error}); choose another --out or make it writable"
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
    """Lock, or raise BlockingIOError. A reader (`is_held`) holds the lock for an instant, so several tries are made."""
    for _ in range(LOOKS):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.01)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_held(out: Path) -> bool:
    """Whether a driver is working on OUT now; False where the file system has no locks (`NoLocks`)."""
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


def write_driver(out: Path, state: DriverState) -> None:
    """Write the process of the driver and what is running or has failed; the file is replaced as a whole. Raises StorageFull."""
    write_whole(out / DRIVER_FILE, _driver_text(state))


def _driver_text(state: DriverState) -> str:
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), **state})


def write_last(out: Path, state: DriverState) -> None:
    """Like `write_driver`, at the end of a run. On a full disk the old file is overwritten, which needs no space. Best effort."""
    try:
        write_driver(out, state)
    except OSError:
        pass
    except StorageFull:
        with contextlib.suppress(OSError):
            (out / DRIVER_FILE).write_text(_driver_text(state), encoding="utf-8")


def read_driver(out: Path) -> DriverState:
    """The state that `write_driver` wrote last; empty if it cannot be read."""
    try:
        answer = json.loads((out / DRIVER_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return cast(DriverState, answer) if isinstance(answer, dict) else {}


@contextlib.contextmanager
def upkeep_lock(out: Path) -> Iterator[None]:
    """The driver's lock, with the state that the last driver wrote restored at the end."""
    state = read_driver(out)
    with driver_lock(out):
        try:
            yield
        finally:
            write_driver(out, state)
