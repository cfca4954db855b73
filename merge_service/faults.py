"""Named points at which tests inject faults, instead of sleeping.

`TEMPORAL_MERGE_FAULTS` is JSON: {point: fault or list of faults}, a fault being {"at": n, "marker": file, "do": what, ...}:

- `kill` (the default) ends the process by SIGKILL, or the process whose id `pid_file` holds (JSON with "pid", such as a run's
  `driver.json`)
- `stop` suspends the process by SIGSTOP
- `spin` loops forever
- `allocate` allocates `bytes` of memory
- `full` raises the error of a full file system
- `count` changes nothing: it appends the process id to its marker at every pass

Invariant: without the environment variable a point costs one dictionary look-up and does nothing. A fault fires once per marker
file, in the process that first reaches its point for the n-th time (the file then holds its id), so a rerun with the same
environment passes.
"""

import errno
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

VARIABLE = "TEMPORAL_MERGE_FAULTS"

_plan: dict[str, Any] = json.loads(os.environ.get(VARIABLE) or "{}")
_reached: dict[str, int] = {}


def point(name: str) -> None:
    """Pass the point `name`; a fault that a test has placed on it takes effect here."""
    placed = _plan.get(name)
    if placed is None:
        return
    _reached[name] = _reached.get(name, 0) + 1
    for fault in placed if isinstance(placed, list) else [placed]:
        if fault.get("do") == "count":
            _count(fault["marker"])
        elif _reached[name] >= fault.get("at", 1) and _first(fault["marker"]):
            _ACTIONS[fault.get("do", "kill")](fault)


def _first(marker: str) -> bool:
    try:
        handle = os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    os.write(handle, str(os.getpid()).encode())
    os.close(handle)
    return True


def _count(marker: str) -> None:
    with Path(marker).open("a") as passings:
        passings.write(f"{os.getpid()}\n")


def _kill(fault: dict[str, Any]) -> None:
    """Kill this process, or the one whose id a file holds and then this one."""
    if "pid_file" not in fault:
        os.kill(os.getpid(), signal.SIGKILL)
    os.kill(json.loads(Path(fault["pid_file"]).read_text())["pid"], signal.SIGKILL)
    time.sleep(60)
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(_: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _spin(_: dict[str, Any]) -> None:
    while True:
        time.sleep(0.1)


def _allocate(fault: dict[str, Any]) -> None:
    bytearray(fault["bytes"])


def _full(_: dict[str, Any]) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


_ACTIONS = {
    "kill": _kill,
    "stop": _stop,
    "spin": _spin,
    "allocate": _allocate,
    "full": _full,
}
