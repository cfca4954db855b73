"""A store that holds a base, experts and the merges of a plan, all tiny and real; as a program: `recipe_toys.py ACT ROOT DIGITS`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.faults import VARIABLE
from merge_service.merging import Member, MergeJob
from merge_service.service import Merger
from pipeline.plan.steps import Plan, Step
from pipeline.store.artifact import Record
from pipeline.store.local import Store
from tests.merge_service import toys
from tests.pipeline.plan_toys import facts, make_plan, study

TASKS = 4
AVERAGES = {"init": "base", "deploy": "all", "technique": "average"}
FOLDS = {"init": "base", "deploy": "ema", "technique": "ties", "params": {"density": 0.5}}


def filled(root: Path, strategies: list[Any], tasks: int = TASKS) -> tuple[Store, Plan]:
    """A store with every weights step of a study's plan."""
    store, plan = Store(root), make_plan(study(strategies, tasks), facts())
    store.prepare()
    rng = np.random.default_rng(4)
    base = toys.towers(rng)
    for step in plan.bases.values():
        put(store, step, base)
    for step in plan.steps.values():
        if step.kind == "train":
            put(store, step, toys.moved(rng, base, spread=3))
    merger = Merger()
    for step in plan.steps.values():
        if step.kind == "merge":
            merger.run(job(store, step, root.parent), step, store)
    return store, plan


def put(store: Store, step: Step, tensors: Any) -> Record:
    """Commit weights as the artifact of a step."""

    def work(stage: Path) -> dict[str, Any]:
        toys.save(stage / WEIGHTS_FILE, tensors)
        (stage / "open_clip_config.json").write_text("{}")
        return {}

    return store.make(step, work)


def job(store: Store, step: Step, room: Path) -> MergeJob:
    """The job of a merge step."""
    base, *members = (
        Member(name, record.path, record.sha256(WEIGHTS_FILE))
        for name, record in [
            (name, record_of(store, fp)) for name, fp in [("base", step.spec["base"]), *step.spec["inputs"]]
        ]
    )
    return MergeJob(
        step.label, step.spec["technique"], step.spec["params"], step.spec["form"], base, tuple(members), 1,
        str(room / "scratch"), str(room / "limits"),
    )  # fmt: skip


def record_of(store: Store, fingerprint: str) -> Record:
    found = store.find(fingerprint)
    assert found is not None
    return found


def merges(store: Store, plan: Plan) -> list[Record]:
    """The records of all merges, in the plan's order."""
    return [record_of(store, fp) for fp, step in plan.steps.items() if step.kind == "merge"]


def exit_code(act: str, store: Store, record: Record, faults: dict[str, Any] | None = None) -> int:
    """The exit code of another process that drops or opens a merge; negative for a signal."""
    line = [sys.executable, "-m", "tests.pipeline.recipe_toys", act, str(store.root), record.fingerprint]
    return subprocess.run(
        line, env={**os.environ, VARIABLE: json.dumps(faults or {})}, check=False
    ).returncode


def main(act: str, root: str, fingerprint: str) -> int:
    store = Store(Path(root))
    record = record_of(store, fingerprint)
    if act == "drop":
        return 0 if store.recipes.drop(record) is None else 1
    store.open_verified(record)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
