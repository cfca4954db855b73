"""One expert by `train_expert` in its own process. `train.py` starts it and defines the job.

Prints one JSON line: wall and CPU seconds of the whole call (weights opened, data mapped, steps, result written and checked)
and of the steps after the first few. The process trains two experts, as a worker does, and measures the second.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from jobs import expert

from workers.training.expert import train_expert

SETTLING = 10  # steps that allocate and fill caches; left out of the steady rate, of every contender


def clocks() -> tuple[float, float]:
    """Wall and CPU seconds."""
    return time.perf_counter(), time.process_time()


def rates(job: dict[str, Any], stamps: list[tuple[float, float]], last: dict[str, Any]) -> dict[str, Any]:
    """Seconds per step and of the whole, from the clocks at the start, after every step, and at the end."""
    start, steady, stop, end = stamps[0], stamps[SETTLING], stamps[-2], stamps[-1]
    steps = len(stamps) - 2 - SETTLING
    found = {"samples": (len(stamps) - 2) * job["batch_size"], **last}
    for at, clock in enumerate(("wall", "cpu")):
        found[f"{clock}_step"] = (stop[at] - steady[at]) / steps
        found[f"{clock}_whole"] = end[at] - start[at]
    return found


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Train a short expert first, then the one that counts."""
    Path(job["out"], "weights").mkdir(parents=True)
    for steps in (SETTLING, job["steps"]):
        stamps = [clocks()]
        hooks = {"train.after_step": lambda _, stamps=stamps: stamps.append(clocks())}
        result = train_expert(expert(job, steps, job["engine"], job["stage"]), hooks=hooks)
        stamps.append(clocks())
    return rates(job, stamps, {"loss": result["loss"][-1][1]})


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
