"""What MLflow costs a sweep: the processor time of telling and delivering everything, per model and as a share of the sweep.

    python benchmarks/tracking.py [--trajectories 288] [--client] [--steps OUT]

A sweep of six tasks is planned and given invented results, so that nothing but tracking runs; it is told row by row, as a driver
does, and delivered to a store in OUT. With `--client` every call goes through MLflow's own client, as where the tables are not known
here. `--steps` names a finished run: the mean processor time of its training, merge and evaluation steps, times their number
in this plan, is what the sweep itself would take.

Invariant: processor time of this process alone, from the first row to the last, imports of MLflow and making the database apart.
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

import record

from pipeline.run.trace import read_timeline
from pipeline.tracking.mlflow.sink import MlflowSink
from pipeline.tracking.tracker import AT_ONCE
from tests.pipeline.tracked_study import EXPERIMENT, Tracked, finished_study

TASKS = ("animals", "scripts", "photos_b", "digits8", "emoji_group", "skin_tone")
TECHNIQUES = ["average", "task_arithmetic", "ties", "dare_ties", "breadcrumbs_ties", "magmax"]
STRATEGIES = [
    {"init": ["base", "latest"], "deploy": ["all", "ema"], "technique": TECHNIQUES},
    {"init": ["ema", "all"], "deploy": ["latest", "all", "ema"], "technique": TECHNIQUES},
]
"""60 strategies; with five seeds 300 trajectories, of which the first so many are taken."""
DESTINATION = "benchmark"


def sweep(out: Path, trajectories: int) -> Tracked:
    """A finished sweep of at least so many trajectories."""
    seeds = range(-(-trajectories // 60))
    return finished_study(out, strategies=STRATEGIES, seeds=seeds, tasks=TASKS)


def delivered(study: Tracked) -> dict[str, float]:
    """Processor seconds of telling, of making ready, and of delivering; and how much there was."""
    outbox, sink = study.outbox(), MlflowSink(study.out, None, EXPERIMENT)
    moments = [time.process_time()]
    study.tell(outbox)
    moments.append(time.process_time())
    sink.connect()
    moments.append(time.process_time())
    rows = 0
    while entries := outbox.undelivered(DESTINATION, AT_ONCE):
        for sent in sink.deliver(entries):
            assert sent.refused is None, sent.refused
            outbox.delivered(DESTINATION, *(entry.seq for entry in sent.entries))
            rows += len(sent.entries)
    moments.append(time.process_time())
    told, ready, sent_seconds = (after - before for before, after in itertools.pairwise(moments))
    models = sum(1 for _ in study.out.rglob("manifest.json"))
    return {
        "telling": told,
        "making ready": ready,
        "delivering": sent_seconds,
        "rows": rows,
        "models": models,
    }


def of_steps(study: Tracked, run: Path) -> float:
    """Processor seconds that the steps of the sweep would take, by the means of those of a real run."""
    seen: dict[str, list[float]] = defaultdict(list)
    for row in read_timeline(run):
        if "fingerprint" in row:
            seen[row["kind"]].append(row["cpu_seconds"])
    count = Counter(step.kind for step in study.plan.steps.values())
    return sum(number * mean(seen[kind]) for kind, number in count.items())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trajectories", type=int, default=288)
    parser.add_argument("--client", action="store_true", help="use MLflow's own client throughout")
    parser.add_argument("--steps", type=Path, metavar="OUT", help="a finished run that says what steps cost")
    record.add_json(parser)
    asked = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as room:
        study = sweep(Path(room) / "out", asked.trajectories)
        way = (
            patch("pipeline.tracking.mlflow.sink.opened", lambda *_: None)
            if asked.client
            else patch("os.nice")
        )
        with way:
            found = delivered(study)
        found["trajectories"] = len(study.plan.trajectories)
        seconds = found["telling"] + found["delivering"]
        found["milliseconds per model"] = 1000 * seconds / found["models"]
        if asked.steps is not None:
            steps = of_steps(study, asked.steps)
            found |= {
                "steps": steps,
                "share of the sweep": (seconds + found["making ready"]) / (steps + seconds),
            }
    for name, value in found.items():
        print(f"{name}: {value:.4g}")
    settings = {"trajectories": asked.trajectories, "client": asked.client, "steps": asked.steps is not None}
    record.save(asked.json, settings, found)


if __name__ == "__main__":
    main()
