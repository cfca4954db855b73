"""What the studies of a store keep of their merges, and making recipes of the rest.

Invariant: a merge that any other registered study keeps, or may still read, stays as it is.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from pipeline.plan.keeping import Keep, kept_merges
from pipeline.plan.steps import Plan
from pipeline.results.over_time import winner
from pipeline.store.artifact import Record
from pipeline.store.local import Store
from pipeline.store.upkeep import upkeep
from pipeline.workspace.registrations import name_of_study, registrations

LOOK_SECONDS = 10.0
"""How long what other studies keep is believed."""


class Others:
    """What other studies of the store than that in OUT keep as files or may still read."""

    def __init__(self, store: Store, plan: Plan, out: Path) -> None:
        self._store, self._own, self._looked = store, name_of_study(plan, out), -LOOK_SECONDS
        self._wanted: frozenset[str] = frozenset()

    def want(self, fingerprint: str) -> bool:
        """Raises StoreError while a registration cannot be read: nothing may be dropped then."""
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            known = registrations(upkeep(self._store))
            self._wanted = frozenset[str]().union(*(one.wants for one in known if one.name != self._own))
            self._looked = time.monotonic()
        return fingerprint in self._wanted


def kept_at_the_end(plan: Plan, how: Keep, results: Mapping[str, object]) -> frozenset[str]:
    """The merges that stay once a study is done; `best`, what the trajectory to deploy serves at its end, is only known then."""
    kept = kept_merges(plan, how)
    if how.keep != "best":
        return kept
    last = {one.id: one.points[-1].merge for one in plan.trajectories}
    best = winner(results)
    return kept - {merge for name, merge in last.items() if merge and (best is None or merge != last[best])}


def droppable(store: Store, plan: Plan, out: Path, kept: frozenset[str]) -> list[Record]:
    """Merges of a plan whose weights are there, are not kept, and are of no use to any other study.

    That includes recipes whose weights were made for a moment: a drop right after use fails while a later fold reads them.
    """
    others = Others(store, plan, out)
    found = (
        store.record(step.kind, fp)
        for fp, step in plan.steps.items()
        if step.kind == "merge" and fp not in kept and not others.want(fp)
    )
    return [
        record
        for record in found
        if record is not None and not (record.is_recipe and store.recipes.missing(record))
    ]
