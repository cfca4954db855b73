"""How far a run is, from what lies in OUT alone: plan, store, lock, outbox.

Invariant: looking changes nothing, and works from another process while the study runs or long after it ended.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from merge_service.errors import UserError
from pipeline.lock import is_held, read_driver
from pipeline.outbox import count_pending
from pipeline.plan import Plan
from pipeline.progress import read_progress
from pipeline.store import Store
from pipeline.store_open import store_of


def open_plan(out: Path) -> Plan:
    """The plan of a run. Raises UserError if OUT holds none."""
    try:
        return Plan.from_json(json.loads((out / "plan.json").read_text()))
    except OSError:
        raise UserError(
            f"{out} holds no run (no plan.json); give the directory that `temporal-merge run` wrote, e.g. runs/demo"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{out / 'plan.json'} is damaged ({error}); run the study again to write it anew"
        ) from None


def open_store(out: Path) -> Store:
    """The store of a run. Raises UserError if OUT holds none."""
    open_plan(out)
    return store_of(out)


def status_of(out: Path) -> dict[str, Any]:
    """{"state", "steps": {"done", "running", "failed", "pending"}, "tracker_pending", "kinds", "running", "failure"}.

    `state` is running while a driver lives, done when every step is in the store, failed when the last driver said so,
    and partial otherwise.
    """
    plan, store = open_plan(out), store_of(out)
    done = {fp for fp, step in plan.steps.items() if store.has(step.kind, fp)}
    driver, alive = read_driver(out), is_held(out)
    running = [step for step in driver.get("running", []) if step["fingerprint"] not in done] if alive else []
    failure = None if alive else driver.get("failed")
    complete = len(done) == len(plan.steps)
    state = "running" if alive else "done" if complete else "failed" if failure else "partial"
    failed = int(bool(failure) and not complete)
    return {
        "state": state,
        "steps": {
            "done": len(done),
            "running": len(running),
            "failed": failed,
            "pending": len(plan.steps) - len(done) - len(running) - failed,
        },
        "tracker_pending": count_pending(out),
        "kinds": Counter(plan.steps[fp].kind for fp in done),
        "running": [
            {**step, "progress": read_progress(out / "scratch", step["fingerprint"])} for step in running
        ],
        "failure": failure,
    }
