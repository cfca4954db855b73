"""The weights that a trajectory serves after a task, as a directory of their own.

Invariant: the directory is there whole or not at all, its files have the sha256 of the record, and the store is left as it was: weights
that are kept as a recipe are made there, not in the store.
"""

import shutil
from pathlib import Path
from typing import TypedDict

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.errors import UserError
from merge_service.files import temporary
from merge_service.techniques import nearest
from pipeline.errors import CorruptArtifact
from pipeline.plan.steps import BASE, Plan, Step
from pipeline.store.artifact import Record, difference
from pipeline.store.local import Store
from pipeline.workspace.opening import open_plan, open_store


def step_served(out: Path, plan: Plan, trajectory: str, t: int | None) -> tuple[Step, int]:
    """What makes the weights that a trajectory serves after t (None: at its end); t = 0 is the base. Raises UserError."""
    known = {one.id: one for one in plan.trajectories}
    if trajectory not in known:
        raise UserError(
            f"{out} has no trajectory {trajectory!r}{nearest(trajectory, known)}; it has {', '.join([*known][:20])}"
        )
    points = {point.t: point for point in known[trajectory].points}
    at = max(points) if t is None else t
    if at not in points:
        raise UserError(f"{trajectory} has no t = {at}; it has {', '.join(map(str, points))}")
    deployed = points[at].deployed
    return plan.weights_step(known[trajectory].base if deployed == BASE else deployed), at


class Exported(TypedDict):
    """A model that was written: where, what serves it, by which step it was made, and whether that was done again (`made`)."""

    out: str
    trajectory: str
    t: int
    step: str
    sha256: str | None
    made: bool


def export(out: Path, trajectory: str, t: int | None, target: Path) -> Exported:
    """Write the weights of a trajectory after t into the new directory `target`.

    Raises UserError for a trajectory, t or target that cannot be, CorruptArtifact for damaged inputs, NondeterminismError when other
    bytes come out.
    """
    step, at = step_served(out, open_plan(out), trajectory, t)
    store = open_store(out)
    record = store.record(step.kind, step.fingerprint)
    if record is None:
        raise UserError(
            f"{trajectory} at t = {at} is not in {store.where} yet; run the study again to make it"
        )
    if target.exists():
        raise UserError(f"{target} exists; give --out a new directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    room = temporary(target)
    try:
        made = _write(store, record, room)
        room.rename(target)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    sha256 = record.sha256(WEIGHTS_FILE)
    return {
        "out": str(target),
        "trajectory": trajectory,
        "t": at,
        "step": step.label,
        "sha256": sha256,
        "made": made,
    }


def _write(store: Store, record: Record, room: Path) -> bool:
    """Fill a new directory with the files of an artifact; whether they had to be made again."""
    made = record.is_made and bool(store.recipes.missing(record))
    if made:
        store.recipes.rebuild(record, room)
        for name in record.files.keys() - {*record.droppable}:
            (room / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(record.path / name, room / name)
    else:
        shutil.copytree(store.open_verified(record), room, ignore=lambda _, names: {"record.json"} & {*names})
    wrong = [name for name, entry in record.files.items() if difference(room, name, entry) is not None]
    if wrong:
        raise CorruptArtifact(
            f"{record.path}: {', '.join(wrong)} did not arrive as the record states; export again"
        )
    return made
