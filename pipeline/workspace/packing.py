"""Packing the experts of a run: their weights as differences from the base, and back.

Experts stay for ever, since merges are made from them, but few are read once a study is done. A packed expert is unpacked where it is
asked for, into the cache of recipes, so that nothing else differs.
Invariant: an expert that a step of the plan still waits for stays as it is; no record's sha256 changes.
"""

from pathlib import Path
from typing import TypedDict

from merge_service.errors import UserError
from pipeline.plan.steps import Plan
from pipeline.store.artifact import PACKED, Record
from pipeline.store.local import Store
from pipeline.store.upkeep import held_elsewhere, sizes_of
from pipeline.workspace.lock import upkeep_lock
from pipeline.workspace.opening import open_plan, open_store


class PackedExpert(TypedDict):
    """An expert: bytes of its weights on the disk, before and after; `why` says what keeps it as it is."""

    place: str
    before: int
    after: int
    why: str | None


class Packing(TypedDict):
    """What `pack` did."""

    store: str
    experts: list[PackedExpert]
    linked: int


def pack(out: Path, undo: bool = False) -> Packing:
    """Pack the experts of the run in OUT, or, with `undo`, make files of them again.

    Raises UserError for a store that is not a directory and while a driver works on OUT, StorageFull, CorruptArtifact.
    """
    plan, store = open_plan(out), open_store(out)
    if type(store) is not Store:
        raise UserError(f"pack needs a store in a directory; {store.where} keeps experts as they are")
    experts, linked = list[PackedExpert](), 0
    with upkeep_lock(out):
        waited = _waited_for(plan, store)
        for fingerprint, step in plan.steps.items():
            record = store.record(step.kind, fingerprint) if step.kind == "train" else None
            if record is None:
                continue
            before, held = _sizes(record)
            linked += held
            if undo:
                why = _unpacked(store, record)
            elif fingerprint in waited:
                why = "a step that is not done reads it"
            else:
                base = store.find(step.base)
                why = "its base is not in the store" if base is None else store.recipes.pack(record, base)
            experts.append(
                {"place": str(record.path), "before": before, "after": _sizes(record)[0], "why": why}
            )
    return {"store": store.where, "experts": experts, "linked": linked}


def describe(answer: Packing) -> list[str]:
    """The answer of `pack` as lines of text."""
    experts = answer["experts"]
    lines = [f"{one['place']} stays as it is: {one['why']}" for one in experts if one["why"]]
    before, after = (sum(one[name] for one in experts) for name in ("before", "after"))
    lines += held_elsewhere(answer["linked"], "of weights")
    return [
        *lines,
        f"{answer['store']}: weights of {len(experts)} experts, {before:,} bytes before, {after:,} now",
    ]


def _waited_for(plan: Plan, store: Store) -> set[str]:
    """The inputs of steps that are not done."""
    ahead = (step for fp, step in plan.steps.items() if not store.has(step.kind, fp))
    return {source for step in ahead for source in step.inputs.values()}


def _unpacked(store: Store, record: Record) -> str | None:
    if record.held == "packed":
        store.recipes.keep(record)
    return None


def _sizes(record: Record) -> tuple[int, int]:
    """Bytes of the weights, as they are and packed: all of them, and those that names elsewhere hold."""
    files = [*(record.path / name for name in record.droppable), *record.path.glob(f"{PACKED}*")]
    sizes = [sizes_of(path) for path in files]
    return sum(map(sum, sizes)), sum(linked for _, linked in sizes)
