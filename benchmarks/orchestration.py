"""The cost of orchestration: beside the steps themselves, and per step as the number of steps grows.

    python benchmarks/orchestration.py overhead STUDY.yaml [--runs 2] [--set key=value ...] [--json FILE]
    python benchmarks/orchestration.py scale [--experts 1000] [--case stream|sweep] [--tracking] [--png FILE] [--json FILE]

`overhead` carries out the steps of a small study in two ways, alternating: by a bare loop of plain function calls in one
process, with the same store, and by `temporal-merge run`. CPU seconds are those of all processes, without start-up.
`scale` runs the real driver, schedule, pools, store and outbox with real Ray actors whose steps only write and commit a tiny
file. `stream` is one stream with a task per expert, each merged into the last; `sweep` is seeds x ten tasks.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline.plan.file import encode
from pipeline.plan.steps import DatasetFacts, Facts, ModelFacts

ROOT = Path(__file__).parent.parent
SMALL = {"experts": {"cpus": 1, "threads": 1}}
WINDOW = 100
"""Steps over which a time per step is averaged."""


# --- a bare loop against a run ----------------------------------------------------------------------------------------


def bare(study: Path, overrides: list[str], out: Path) -> None:
    """Every step of a study, one after another, in this process; prints the CPU seconds without imports and planning."""
    from merge_service.service import Merger
    from pipeline.run.carriers import CARRIERS
    from pipeline.run.jobs import Jobs
    from pipeline.workspace.workspace import Workspace
    from workers.actors import Worker

    workspace = Workspace.open(study, overrides, out)
    workspace.prepare()
    jobs, worker, merger = Jobs(workspace), Worker(0, 1, 1, "cpu"), Merger()
    import workers.scoring.evaluate
    import workers.training.expert  # noqa: F401

    began = time.process_time()
    kinds: dict[str, float] = {}
    for step in workspace.plan.steps.values():
        before = time.process_time()
        record = (merger if step.kind == "merge" else worker).run(
            CARRIERS[step.kind].job(jobs, step), step, workspace.store
        )
        workspace.keep(record)
        kinds[step.kind] = kinds.get(step.kind, 0.0) + time.process_time() - before
    print(
        json.dumps({"cpu": time.process_time() - began, "steps": len(workspace.plan.steps), "kinds": kinds})
    )


class Meter(threading.Thread):
    """CPU seconds of a process and all its descendants, dead ones too, as they grow; sampled twice a second."""

    def __init__(self, root: int) -> None:
        import psutil

        super().__init__(daemon=True)
        self.gone = psutil.NoSuchProcess
        self.root = psutil.Process(root)
        self.seen: dict[tuple[int, float], tuple[str, float]] = {}
        self.curve: list[tuple[float, float]] = []
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.5):
            try:
                family = [self.root, *self.root.children(recursive=True)]
            except self.gone:
                return
            for process in family:
                try:
                    spent, name = process.cpu_times(), process.name()
                    self.seen[process.pid, process.create_time()] = (name, spent.user + spent.system)
                except self.gone:
                    continue
            self.curve.append((time.time(), self.total))

    @property
    def total(self) -> float:
        return sum(cpu for _, cpu in self.seen.values())

    def at(self, moment: float) -> float:
        """CPU seconds that had been spent by then."""
        return max((cpu for when, cpu in self.curve if when <= moment), default=0.0)

    def by_name(self) -> dict[str, float]:
        answer: dict[str, float] = {}
        for name, cpu in self.seen.values():
            answer[name] = answer.get(name, 0.0) + cpu
        return answer


def orchestrated(study: Path, overrides: list[str], out: Path) -> dict[str, Any]:
    """The same steps by `temporal-merge run`."""
    from pipeline.run.trace import read_timeline

    line = [sys.executable, "-m", "pipeline.cli", "run", str(study), "--out", str(out)]
    line += [word for text in overrides for word in ("--set", text)]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    meter = Meter(process.pid)
    meter.start()
    if process.wait() != 0:
        raise SystemExit(f"the run ended with {process.returncode}; run it by hand: {' '.join(line)}")
    meter.stopped.set()
    steps = [entry for entry in read_timeline(out) if "fingerprint" in entry]
    firsts: dict[str, float] = {}
    for step in steps:
        firsts[step["worker"]] = min(step["start"], firsts.get(step["worker"], step["start"]))
    ready, end = max(firsts.values()), max(step["end"] for step in steps)
    before = sum(
        step["cpu_seconds"]
        * max(0.0, min(step["end"], ready) - step["start"])
        / (step["end"] - step["start"])
        for step in steps
        if step["start"] < ready
    )
    return {
        "all": meter.total,
        "started": meter.at(end) - meter.at(ready) + before,
        "steps_cpu": sum(step["cpu_seconds"] for step in steps),
        "by_name": meter.by_name(),
        "steps": len(steps),
    }


def overhead(study: Path, overrides: list[str], runs: int) -> dict[str, Any]:
    """Print both, run by run, and the ratio of their sums."""
    sums = {"bare": 0.0, "run": 0.0, "steps": 0.0}
    found = []
    for number in range(runs):
        with tempfile.TemporaryDirectory() as room:
            line = [sys.executable, __file__, "bare", str(study), "--out", f"{room}/bare"]
            line += [word for text in overrides for word in ("--set", text)]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # fmt: skip
            said = subprocess.run(
                line, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
            )
            loop = json.loads(said.stdout.splitlines()[-1])
            run = orchestrated(study, overrides, Path(room) / "run")
        print(
            f"run {number + 1}: bare loop {loop['cpu']:.1f} s CPU for {loop['steps']} steps; orchestrated {run['started']:.1f} s "
            f"after start-up, of which steps {run['steps_cpu']:.1f} s; {run['all']:.1f} s with start-up"
        )
        top = sorted(run["by_name"].items(), key=lambda entry: -entry[1])[:6]
        print("   by process:", ", ".join(f"{name} {cpu:.1f}" for name, cpu in top), flush=True)
        found.append({"bare": loop, "run": run})
        sums["bare"] += loop["cpu"]
        sums["run"] += run["started"]
        sums["steps"] += run["steps_cpu"]
    print(
        f"orchestrated / bare = {sums['run'] / sums['bare']:.3f}; steps alone / bare = {sums['steps'] / sums['bare']:.3f}"
    )
    return {"runs": found, "sums": sums}


# --- a thousand experts that do nothing -------------------------------------------------------------------------------


class Nothing:
    """Writes and commits a tiny file instead of training, merging or scoring."""

    def __init__(self, *_: Any) -> None:
        pass

    def run(self, job: Any, step: Any, store: Any) -> Any:
        store.open_inputs(step)
        with store.staged(step) as stage:
            if step.kind != "evaluate":
                (stage / "open_clip_model.safetensors").write_text(step.fingerprint)
            return store.commit(step, stage, _result(step), seconds=0.0)


def _result(step: Any) -> dict[str, Any]:
    if step.kind == "train":
        return {"steps": 1, "samples": 1, "loss": [[1, 1.0]], "samples_per_second": 1.0, "lr": [1, 1, 1], "seconds": 0.0, "task_vector_norm": 1.0, "resumed_from": None}  # fmt: skip
    if step.kind == "merge":
        return {"merge_seconds": 0.0, "merged_norm": 1.0}
    names = [source["dataset"] for source in step.spec["datasets"]]
    return {"scores": dict.fromkeys(names, 0.5), "samples": dict.fromkeys(names, 1), "seconds": 0.0}


def workspace_of(experts: int, case: str, out: Path) -> Any:
    """A study of so many experts over data that nobody will read."""
    from pipeline.plan.planner import make_plan
    from pipeline.study.config import study_from
    from pipeline.study.sections import key_of
    from pipeline.study.streams import make_stream
    from pipeline.workspace.workspace import Workspace

    tasks = experts if case == "stream" else 10
    names = [f"d{number}" for number in range(1, tasks + 1)]
    study = study_from(
        {
            "name": f"{case}-{experts}",
            "model": {"config": "toy"},
            "data": {"root": "nowhere", "pretraining": [], "adaptation": names[:4], "held_out": ["kept"]},
            "stream": {"tasks": names},
            "recipe": {
                "batch_size": 64,
                "precision": "fp32",
                "mixture": {"pretraining": 0, "update": 1, "buffer": 0},
            },
            "budget": {"steps_per_task": 1},
            "grid": {
                "strategies": ["best_in_time"],
                "seed": list(range(1 if case == "stream" else experts // 10)),
            },
            "resources": SMALL,
        }
    ).resolved()
    digests = {"train": "a" * 64, "test": "b" * 64}
    facts = Facts(
        {name: DatasetFacts(digests, "p") for name in [*names, "kept"]},
        {key_of(model): ModelFacts("b" * 64) for model in study.models},
        {
            key_of(section): make_stream(study.filled(section), {name: ["a"] for name in names})
            for section in study.streams
        },
    )
    return Workspace(study, out, make_plan(study, facts), facts)


def scale(experts: int, case: str, tracking: bool, target: Path) -> dict[str, Any]:
    """Drive a study of steps that do nothing; print and draw the driver's time and memory as it goes on."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import psutil

    from benchmarks.orchestration import Nothing as importable
    from cluster.session import connect
    from pipeline.run import driver
    from pipeline.tracking.session import Tracking

    samples: list[tuple[float, float, float]] = []

    class Watched(driver._Drive):
        def _complete(self, call: Any) -> None:
            super()._complete(call)
            process = psutil.Process()
            samples.append((time.monotonic(), time.thread_time(), process.memory_info().rss / 2**20))

    with tempfile.TemporaryDirectory() as room:
        workspace = workspace_of(experts, case, Path(room) / "out")
        workspace.out.mkdir()
        _prepare(workspace)
        stopped = patch("pipeline.tracking.tracker.Tracker.start") if not tracking else patch("os.nice")
        with (
            patch("pipeline.run.carriers.Worker", importable),
            patch("pipeline.run.carriers.Merger", importable),
            patch("pipeline.run.driver.print", lambda *_, **__: None, create=True),
            stopped,
            Tracking(workspace) as told,
            connect("local") as session,
        ):
            drive = Watched(workspace, session, told, set())
            drive.progress.console.quiet = True
            drive.run()
            told.tracker._stop.set()
    return _report(samples, len(workspace.plan.steps), f"{case}, {experts} experts", target)


def _prepare(workspace: Any) -> None:
    """The store and a base that is one small file."""
    workspace.store.prepare()
    (base,) = workspace.plan.bases.values()
    with workspace.store.staged(base) as stage:
        (stage / "open_clip_model.safetensors").write_text("base")
        workspace.store.commit(base, stage, {"origin": "none"}, seconds=0.0)
    (workspace.out / "plan.json").write_text(json.dumps(encode(workspace.plan)))


def _report(samples: list[tuple[float, float, float]], steps: int, what: str, target: Path) -> dict[str, Any]:
    windows = range(WINDOW, len(samples), WINDOW)
    wall = [(samples[end][0] - samples[end - WINDOW][0]) / WINDOW * 1000 for end in windows]
    cpu = [(samples[end][1] - samples[end - WINDOW][1]) / WINDOW * 1000 for end in windows]
    memory = [samples[end][2] for end in windows]
    print(f"{what}: {steps} steps, {samples[-1][0] - samples[0][0]:.0f} s")
    for name, values, unit in (
        ("time per step", wall, "ms"),
        ("driver CPU per step", cpu, "ms"),
        ("driver memory", memory, "MiB"),
    ):
        print(
            f"  {name:20} {values[1]:.2f} at first, {values[-1]:.2f} at last, {max(values):.2f} at most {unit}"
        )
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained")
    above.plot(windows, wall, color="#0072B2", label="wall")
    above.plot(windows, cpu, color="#D55E00", label="driver's CPU")
    above.set_ylabel("ms per step")
    above.set_ylim(bottom=0)
    above.legend(frameon=False)
    above.set_title(f"{what}: steps that do nothing, mean over {WINDOW}", loc="left", fontsize=10)
    below.plot(windows, memory, color="#009E73")
    below.set_ylabel("driver memory, MiB")
    below.set_ylim(bottom=0)
    below.set_xlabel("steps done")
    figure.savefig(target, dpi=150)
    print(target)
    return {"steps": steps, "window": WINDOW, "wall_ms": wall, "cpu_ms": cpu, "memory_mib": memory}


def main() -> None:
    import record  # a worker of Ray imports this module, and finds nothing beside it

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_subparsers(dest="what", required=True)
    for name in ("overhead", "bare"):
        one = what.add_parser(name)
        one.add_argument("study", type=Path)
        one.add_argument("--set", dest="overrides", action="append", default=[])
        one.add_argument("--runs", type=int, default=2)
        one.add_argument("--out", type=Path)
    many = what.add_parser("scale")
    many.add_argument("--experts", type=int, default=1000)
    many.add_argument("--case", choices=("stream", "sweep"), default="stream")
    many.add_argument("--tracking", action="store_true", help="deliver to MLflow meanwhile")
    many.add_argument("--png", type=Path, default=Path("orchestration.png"))
    for one in what.choices.values():
        record.add_json(one)
    options = parser.parse_args()
    if options.what == "bare":
        bare(options.study, options.overrides, options.out)
    elif options.what == "scale":
        settings = {name: getattr(options, name) for name in ("experts", "case", "tracking")}
        record.save(
            options.json, settings, scale(options.experts, options.case, options.tracking, options.png)
        )
    else:
        settings = {"study": options.study.name, "set": options.overrides, "runs": options.runs}
        record.save(options.json, settings, overhead(options.study, options.overrides, options.runs))


if __name__ == "__main__":
    main()
