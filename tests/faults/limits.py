"""The cost of a piece of code, measured in its own process, so that the memory of other tests does not hide it."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PRELUDE = """
import json, sys, time
from pathlib import Path

arguments = json.loads(sys.argv[1])

def megabytes(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024

def begin():
    global before, began
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory counts from here
    before, began = megabytes("VmRSS"), time.perf_counter()

def end(**more):
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "grown": megabytes("VmHWM") - before, "more": more}))
"""


@dataclass(frozen=True)
class Cost:
    """Seconds, and the growth of resident memory at its peak in megabytes; `more` is what the code reported."""

    seconds: float
    grown: float
    more: dict[str, Any]


def cost_of(code: str, *arguments: Any) -> Cost:
    """Run `code`, which calls `begin()` when it has imported all it needs, and `end(...)` when it is done."""
    answer = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, json.dumps(arguments, default=str)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    return Cost(**json.loads(answer.stdout.splitlines()[-1]))
