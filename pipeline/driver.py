"""The one loop that carries out a plan: what is ready goes to a free actor, what comes back is recorded.

Invariant: the driver holds no truth. Which steps are done is read from the store when it starts; an actor's answer only
means that the store has the artifact. So the same command, run again after any crash, goes on where things stood.
"""

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.pool import Call, Pool, group_limit, wait
from cluster.session import Session, check_address, connect
from merge_service.actor import Merger
from merge_service.errors import UserError
from merge_service.faults import point
from pipeline.errors import CorruptArtifact, NondeterminismError, StepFailed, StorageFull
from pipeline.jobs import job_of
from pipeline.lock import driver_lock, write_driver
from pipeline.plan import Step
from pipeline.progress import Progress
from pipeline.recording import Tracking
from pipeline.registry import retire
from pipeline.schedule import Schedule
from pipeline.show import print_results, trajectory_rows
from pipeline.workspace import Workspace
from workers.actors import Evaluator, ExpertWorker, gather

KINDS = ("train", "merge", "evaluate")
TICK_SECONDS = 0.5
FATAL = (UserError, NondeterminismError, StorageFull)
"""Errors that another try cannot mend."""


def run_study(path: Path, overrides: Sequence[str], out: Path | None, address: str) -> None:
    """Run a study to its end, or from where it stopped. Raises UserError (exit 2) or StepFailed."""
    check_address(address)
    workspace = Workspace.open(path, overrides, out)
    for warning in workspace.study.warnings:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    workspace.check_data()
    with driver_lock(workspace.out):
        workspace.prepare()
        summary = workspace.summary()
        workspace.store.check_room(f"study {workspace.study.name}", summary["disk_bytes"])
        tracking = Tracking(workspace)
        done = workspace.done()
        print(_outlook(summary), file=sys.stderr, flush=True)
        try:
            with tracking:
                if len(done) < len(workspace.plan.steps):
                    with connect(address, threads=workspace.study.resources.experts.threads) as session:
                        _Drive(workspace, session, tracking, done).run()
                results = workspace.write_results()
                tracking.finished(results)
        finally:
            write_driver(workspace.out, {"ended": True, "failed": workspace.failure})
            retire(workspace.store, workspace.plan, workspace.out)
    print_results(workspace.out, results, tracking)


class _Drive:
    """One run over one session."""

    def __init__(self, workspace: Workspace, session: Session, tracking: Tracking, done: set[str]) -> None:
        self.workspace, self.tracking = workspace, tracking
        self.steps = workspace.plan.steps
        self.schedule = Schedule(self.steps, done)
        self.pools = _pools(workspace, session)
        self.running: dict[Call, Step] = {}
        self.tries: dict[str, int] = {}
        self.progress = Progress(
            len(self.steps), len(self.schedule.done), workspace.scratch, lambda: trajectory_rows(workspace)
        )

    def run(self) -> None:
        with self.progress, contextlib.ExitStack() as stack:
            for pool in self.pools.values():
                stack.callback(pool.close)
            while not self.schedule.finished:
                self._start_ready()
                for call in wait(list(self.running), TICK_SECONDS):
                    self._take(call)
                self.progress.tick()

    def _start_ready(self) -> None:
        for kind in KINDS:
            pool = self.pools[kind]
            for fingerprint in self.schedule.ready(kind)[: pool.free]:
                step = self.steps[fingerprint]
                job = job_of(step, self.workspace)
                self.running[pool.call("run", job, step, self.workspace.store)] = step
                self.schedule.start(fingerprint)
                self.progress.started(fingerprint, step.label)
                self._say()

    def _take(self, call: Call) -> None:
        step = self.running.pop(call)
        try:
            record = call.result()
        except CorruptArtifact as error:
            self._put_back_lost(step, str(error))
        except Exception as error:
            self._retry_or_fail(step, error)
        else:
            self.schedule.finish(step.fingerprint)
            self.tracking.committed(step, record)
            self.progress.finished(step.fingerprint, _summary(record))
            point("driver.after_commit")
        self._say()

    def _put_back_lost(self, step: Step, why: str) -> None:
        """An input was damaged and has been moved aside: make it again, then this step."""
        for need in self.schedule.needs(step.fingerprint):
            if not self.workspace.store.has(self.steps[need].kind, need):
                self.schedule.put_back(need)
        self._retry_or_fail(step, CorruptArtifact(why))

    def _retry_or_fail(self, step: Step, error: Exception) -> None:
        tries = self.tries[step.fingerprint] = self.tries.get(step.fingerprint, 0) + 1
        limit = self.workspace.study.resources.experts.max_retries
        if isinstance(error, FATAL) or tries > limit:
            self.tracking.failed(step, error)
            self.workspace.failure = {"step": step.label, "error": str(error)}
            if isinstance(error, FATAL):
                raise error
            raise StepFailed(f"{step.label}: failed {tries} times, the last time with: {_first_line(error)}")
        self.schedule.put_back(step.fingerprint)
        self.progress.put_back(step.fingerprint, f"{_first_line(error)} (try {tries} of {limit})")
        time.sleep(0.1)

    def _say(self) -> None:
        running = [
            {"fingerprint": step.fingerprint, "kind": step.kind, "label": step.label}
            for step in self.running.values()
        ]
        write_driver(self.workspace.out, {"running": running})


def _pools(workspace: Workspace, session: Session) -> dict[str, Pool]:
    """Expert groups, one merger, evaluators; each asked for only what the cluster has."""
    resources, spec = workspace.study.resources, workspace.study.engine
    experts, evaluation = resources.experts, resources.evaluation
    reserved = evaluation.actors * evaluation.cpus, evaluation.actors * evaluation.gpus
    groups = None if experts.groups == "auto" else experts.groups
    limit = group_limit(groups, session, experts.workers, experts.cpus, experts.gpus, reserved)
    return {
        "train": Pool(
            "expert", ExpertWorker,
            lambda actor, rank: actor.remote(rank, spec.world, spec.threads, spec.device),
            world=experts.workers, cpus=experts.cpus, gpus=experts.gpus, limit=limit, gather=gather,
        ),
        "merge": Pool("merge", Merger, lambda actor, _: actor.remote(), cpus=0),
        "evaluate": Pool(
            "evaluation", Evaluator, lambda actor, _: actor.remote(evaluation.threads),
            cpus=evaluation.cpus, gpus=evaluation.gpus, limit=evaluation.actors,
        ),
    }  # fmt: skip


def _outlook(summary: dict[str, Any]) -> str:
    """What is ahead, and what sharing saves, in one line."""
    kinds = [
        f"{counts['unique']} {kind} ({counts['naive']} one by one, {counts['cached']} in store)"
        for kind, counts in summary["steps"].items()
    ]
    return f"{summary['study']}: {summary['trajectories']} trajectories; steps: {', '.join(kinds)}"


def _summary(record: Any) -> str:
    """The one thing a person wants to know of a finished step."""
    result = record.result
    if record.kind == "train":
        return f"{result['steps']} steps, loss {result['loss'][-1][1]:.3f}, {result['samples_per_second']:.0f} samples/s"
    if record.kind == "merge":
        return f"norm {result['merged_norm']:.3f}" if result.get("merged_norm") is not None else "merged"
    scores = result["scores"]
    return f"mean of {len(scores)} scores {sum(scores.values()) / len(scores):.3f}"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
