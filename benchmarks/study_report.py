"""How long `temporal-merge report` takes for a large study, and how big its page is: real plan, invented scores.

    python benchmarks/study_report.py configs/sweep.yaml --out /tmp/report

Invariant: nothing is trained; scores depend on the plan alone, so two builds draw the same.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import record

from pipeline.plan.steps import Plan
from pipeline.store.artifact import Record

GAIN = {"base": 0.02, "latest": 0.05, "ema": 0.07, "all": 0.06}
"""What a task adds to KA by initialization and by deployment: enough to tell the paths apart."""


class Invented:
    """A store in which every evaluation of a plan has a score; `upto` leaves out what comes after that t."""

    def __init__(self, plan: Plan, upto: int = 10**9) -> None:
        self._records: dict[str, Record] = {}
        for trajectory in plan.trajectories:
            pace = GAIN[trajectory.init] + GAIN[trajectory.deploy]
            luck = random.Random(trajectory.id)
            pace += 0.01 * random.Random(str(trajectory.technique)).random()
            for point in trajectory.points:
                if point.t <= upto:
                    seen = {name: max(0, point.t - 1 - i) for i, name in enumerate(plan.adaptation)}
                    scores = {name: _score(0.15 + pace * (point.t - 0.4 * seen[name]), luck) for name in seen}
                    scores |= {name: _score(0.7 - 0.4 * pace * point.t, luck) for name in plan.held_out}
                    self._tell(point.evaluate, {"scores": scores})

    def record(self, kind: str, fingerprint: str) -> Record | None:
        return self._records.get(fingerprint) if kind == "evaluate" else None

    def _tell(self, fingerprint: str, result: dict[str, Any]) -> None:
        record = Record("evaluate", fingerprint, "invented", {}, {}, {}, {}, result, 0, 1.0, {}, Path())
        self._records.setdefault(fingerprint, record)


def _score(mean: float, luck: random.Random) -> float:
    return min(1.0, max(0.0, luck.gauss(mean, 0.02)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="OUT/report is written")
    record.add_json(parser)
    arguments = parser.parse_args()
    from pipeline.report.build import write_report
    from pipeline.report.sources import Studied
    from pipeline.results.over_time import results
    from pipeline.workspace.workspace import Workspace

    plan = Workspace.open(arguments.study, provisional=True).plan
    arguments.out.mkdir(parents=True, exist_ok=True)
    started, cpu = time.perf_counter(), time.process_time()
    answer = write_report([Studied(arguments.out, plan, results(plan, Invented(plan)))])
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    found = {
        "trajectories": len(plan.trajectories),
        "seconds": seconds,
        "cpu": cpu,
        "html_bytes": Path(answer["html"]).stat().st_size,
        "figures": len(answer["figures"]) // 2,
        "missing": answer["missing"],
    }
    print(json.dumps(found, indent=2))
    record.save(arguments.json, {"study": arguments.study.name}, found)


if __name__ == "__main__":
    main()
