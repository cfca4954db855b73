"""The cost of a plan: seconds, memory and length of plan.json, for a long stream or many trajectories. Nothing is trained.

    python benchmarks/plan.py --tasks 1000                           # one long stream, two strategies
    python benchmarks/plan.py --tasks 3 --trajectories 10000         # many trajectories

Invariant: every part runs in its own process, which measures itself.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import record
import yaml

from pipeline.plan import file as plan_file
from pipeline.run.status import status_of
from pipeline.workspace.workspace import Workspace

STRATEGIES = [
    "best_in_time",
    {"init": "base", "deploy": "all", "technique": "ties", "params": {"density": 0.5}},
]
RUNS = {"first": "plan", "again": "plan", "status": "status"}
"""Parts in their order; the first plan of a model also measures what a sample costs."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--trajectories", type=int, default=len(STRATEGIES))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    record.add_json(parser)
    asked = parser.parse_args()
    if asked.part:
        print(json.dumps(PARTS[asked.part](asked.home)))
        return
    with tempfile.TemporaryDirectory() as home:
        study_of(Path(home), asked.tasks, -(-asked.trajectories // len(STRATEGIES)))
        found = {name: _in_a_process(part, home) for name, part in RUNS.items()}
    settings = {"tasks": asked.tasks, "trajectories": asked.trajectories}
    print(json.dumps(settings | found, indent=1))
    record.save(asked.json, settings, found)


def _in_a_process(part: str, home: str) -> dict[str, float]:
    line = [sys.executable, __file__, "--part", part, "--home", home]
    answer = subprocess.run(line, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return found


def plan(home: Path) -> dict[str, float]:
    """Seconds and CPU seconds of making the plan, without imports, and of writing it; steps, bytes, peak memory."""
    began, cpu = time.perf_counter(), time.process_time()
    made = Workspace.open(home / "study.yaml", [], home / "out", provisional=True).plan
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    (home / "out").mkdir(exist_ok=True)
    began = time.perf_counter()
    plan_file.write(made, home / "out" / "plan.json")
    wrote = time.perf_counter() - began
    size = (home / "out" / "plan.json").stat().st_size
    return {
        "seconds": seconds,
        "cpu": cpu,
        "steps": len(made.steps),
        "bytes": size,
        "write": wrote,
        "peak": peak(),
    }


def status(home: Path) -> dict[str, float]:
    """Seconds and CPU seconds of `status`, and peak memory."""
    began, cpu = time.perf_counter(), time.process_time()
    status_of(home / "out")
    return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu, "peak": peak()}


def peak() -> int:
    """The most bytes that were resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


PARTS: dict[str, Any] = {"plan": plan, "status": status}


def study_of(home: Path, tasks: int, seeds: int) -> None:
    """Write study.yaml over datasets that only a suite describes."""
    one = {"kind": "classification", "template": "a {c}", "classes": 5}
    learnt = [
        {"name": f"d{i:05}", "role": "adaptation", "train": 100, "test": 50, **one} for i in range(tasks)
    ]
    others = [
        {"name": "pool", "role": "pretraining", "train": 100, **one},
        {"name": "kept", "role": "held_out", "test": 50, **one},
    ]
    (home / "suite.yaml").write_text(
        yaml.safe_dump({"format": 1, "name": "long", "datasets": [*learnt, *others]})
    )
    (home / "none").mkdir()
    tree = {
        "name": "long",
        "model": {"config": "tiny-clip", "pretrained": "configs/models/tiny-clip"},
        "data": {"suite": str(home / "suite.yaml"), "root": str(home / "none"), "cache": str(home / "cache")},
        "recipe": {"mixture": {"pretraining": 0.33, "update": 0.34, "buffer": 0.33}},
        "budget": {"steps_per_task": 10},
        "grid": {"strategies": STRATEGIES, "seed": list(range(seeds))},
    }
    (home / "study.yaml").write_text(yaml.safe_dump(tree))


if __name__ == "__main__":
    main()
