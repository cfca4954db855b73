"""What a plan costs: seconds, memory and the length of plan.json of a long stream, or of many trajectories; nothing is trained.

python benchmarks/plan.py --tasks 1000                           # one long stream, two strategies
python benchmarks/plan.py --tasks 3 --trajectories 10000         # many trajectories
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from pipeline.plan import file as plan_file
from pipeline.run.status import status_of
from pipeline.workspace.workspace import Workspace

STRATEGIES = [
    "best_in_time",
    {"init": "base", "deploy": "all", "technique": "ties", "params": {"density": 0.5}},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--trajectories", type=int, default=len(STRATEGIES))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part:
        PARTS[asked.part](asked.home)
        return
    with tempfile.TemporaryDirectory() as home:
        study_of(Path(home), asked.tasks, -(-asked.trajectories // len(STRATEGIES)))
        print(f"{asked.tasks} tasks, {asked.trajectories} trajectories")
        for part, what in (
            ("plan", "the first plan, which measures the model"),
            ("plan", "again"),
            ("status", "status"),
        ):
            answer = subprocess.run(
                [sys.executable, __file__, "--part", part, "--home", home],
                check=True,
                capture_output=True,
                text=True,
            )
            print(f"{what}: {answer.stdout.strip()}")


def plan(home: Path) -> None:
    began, cpu = time.perf_counter(), time.process_time()
    made = Workspace.open(home / "study.yaml", [], home / "out", provisional=True).plan
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    (home / "out").mkdir(exist_ok=True)
    began = time.perf_counter()
    plan_file.write(made, home / "out" / "plan.json")
    wrote = time.perf_counter() - began
    size = (home / "out" / "plan.json").stat().st_size / 1e6
    print(
        f"{len(made.steps)} steps in {seconds:.1f} s (CPU {cpu:.1f} s), plan.json {size:.1f} MB in {wrote:.1f} s; {peak()}"
    )


def status(home: Path) -> None:
    began = time.perf_counter()
    status_of(home / "out")
    print(f"{time.perf_counter() - began:.1f} s; {peak()}")


def peak() -> str:
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB"


PARTS = {"plan": plan, "status": status}


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
