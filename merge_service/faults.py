"""Named points where tests place faults, instead of sleeping and hoping.

Invariant: without the environment variable a point costs one dictionary look-up and does nothing. A fault fires once per
marker file, in whatever process first reaches its point for the n-th time, so a rerun under the same environment passes.

`TEMPORAL_MERGE_FAULTS` is JSON: {point: {"at": n, "marker": file, "pid_file": file}}; `pid_file` (JSON with "pid", such as a run's
`driver.json`) names another process to kill, otherwise it is the one that reaches the point.
"""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

VARIABLE = "TEMPORAL_MERGE_FAULTS"

_plan: dict[str, dict[str, Any]] = json.loads(os.environ.get(VARIABLE) or "{}")
_reached: dict[str, int] = {}


def point(name: str) -> None:
    """Pass the point `name`; dies here if a test has placed a fault on it."""
    fault = _plan.get(name)
    if fault is None:
        return
    _reached[name] = _reached.get(name, 0) + 1
    if _reached[name] >= fault.get("at", 1) and _first(fault["marker"]):
        _kill(fault)


def _first(marker: str) -> bool:
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _kill(fault: dict[str, Any]) -> None:
    """Kill the process itself, or the one whose id a file holds, and then wait to be ended with it."""
    if "pid_file" not in fault:
        os.kill(os.getpid(), signal.SIGKILL)
    os.kill(json.loads(Path(fault["pid_file"]).read_text())["pid"], signal.SIGKILL)
    time.sleep(60)
    os.kill(os.getpid(), signal.SIGKILL)
