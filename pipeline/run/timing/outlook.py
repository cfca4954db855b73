"""How long a plan would take, from measured steps in its store and OUT, or from a short calibration.

Invariant: an estimate does not change store or OUT; a calibration uses a temporary directory.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from merge_service.errors import UserError
from pipeline.kinds.table import KINDS
from pipeline.plan.steps import Step
from pipeline.run.jobs import Jobs
from pipeline.run.timing.pace import Pace, pace_of
from pipeline.study.sections import StorageSection
from pipeline.workspace.workspace import Workspace

CALIBRATION_STEPS, WARM_UP = 6, 2
"""Optimizer steps of a calibration, and those at its beginning that are not timed."""
RECORDS = 20
"""Most records that are read of each kind and model, because a store may be remote."""


class Estimate(TypedDict):
    """Seconds for the steps that are not in the store: in sequence, and on the longest chain."""

    work: float
    longest_chain: float


def pace_known(workspace: Workspace) -> Pace:
    """The pace of a plan's steps, from the timeline of its OUT and the records in its store."""
    pace = pace_of(workspace.plan.steps, workspace.out)
    if not pace.measured:
        asked = Counter[tuple[str, str]]()
        for fingerprint in sorted(workspace.done()):
            step = workspace.plan.steps[fingerprint]
            asked[step.kind, step.model] += 1
            if (
                asked[step.kind, step.model] <= RECORDS
                and (record := workspace.known(fingerprint)) is not None
            ):
                pace.took(fingerprint, record.seconds)
    return pace


def estimate(workspace: Workspace, pace: Pace) -> Estimate | None:
    """How long the remaining steps take; None while no such step was measured."""
    done = workspace.done()
    if pace.left(done) is None:
        return None
    left = [pace.seconds(name) or 0.0 for name in workspace.plan.steps if name not in done]
    return {"work": sum(left), "longest_chain": pace.chain(done)}


def calibrate(workspace: Workspace, pace: Pace, say: Callable[[str], None]) -> None:
    """Train a few steps of each model and score its base once, in this process.

    Raises UserError for a study that trains on GPUs or over several ranks, because this process measures neither.
    """
    resources = workspace.study.resources
    for model in {step.model for step in workspace.plan.steps.values()}:
        experts = resources.of(model).experts
        if experts.gpus or experts.workers > 1 or experts.zero_stage:
            raise UserError(
                f"--calibrate: experts of {model} train on GPUs or over several ranks, and this process does neither; run the study for a "
                "while, then plan again: its OUT then has the times of steps"
            )
    with tempfile.TemporaryDirectory(prefix="temporal-merge-") as room:
        study = workspace.study.model_copy(update={"storage": StorageSection()})
        inside = Workspace(study, Path(room) / "out", workspace.plan, workspace.facts)
        inside.prepare()
        jobs = Jobs(inside)
        for kind in (name for name, row in KINDS.items() if row.trains or row.scores):
            for step in _firsts(workspace, kind):
                say(f"calibrating: {step.label}")
                pace.took(step.fingerprint, _timed(jobs, step, Path(room)))


def _firsts(workspace: Workspace, kind: str) -> list[Step]:
    """The first step of a kind for each model that needs only the base."""
    found: dict[str, Step] = {}
    for step in workspace.plan.steps.values():
        if step.kind == kind and all(need in workspace.plan.bases for need in step.inputs.values()):
            found.setdefault(step.model, step)
    return list(found.values())


def _timed(jobs: Jobs, step: Step, room: Path) -> float:
    """Seconds that a step takes, from a few of its optimizer steps or from the whole step."""
    if not KINDS[step.kind].trains:
        from workers.scoring.evaluate import evaluate

        return float(evaluate(jobs.evaluate(step))["seconds"])
    from workers.training.expert import train_expert

    turns: list[float] = []
    steps = min(CALIBRATION_STEPS, step.spec["steps"])
    job = replace(
        jobs.train(step),
        steps=steps,
        checkpoint_every=0,
        asked_limits=(),
        out=str(room / "expert"),
        scratch=str(room / "scratch"),
    )
    train_expert(job, hooks={"train.start": lambda _: _now(turns), "train.after_step": lambda _: _now(turns)})
    timed = turns[min(WARM_UP, steps - 1) :]
    return (timed[-1] - timed[0]) / (len(timed) - 1) * float(step.spec["steps"])


def _now(turns: list[float]) -> None:
    turns.append(time.perf_counter())
