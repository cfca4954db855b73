"""Statistics over whole tensors (thresholds, norms, angles) that must be known before a block can be made.

All of it is asked for with questions whose answers add up over parts of a model, so that one process or many can answer.

Invariant: nothing here touches a block, and what is found is exact.
"""

from typing import Any

from merge_service.blocks.questions import (
    Ask,
    Count,
    Findings,
    Grams,
    Key,
    Limits,
    Products,
    Quantity,
    Summed,
    Sums,
    Window,
)
from merge_service.blocks.search import search
from merge_service.engine.task import MergeTask
from merge_service.techniques import spherical
from merge_service.techniques.ranks import clamp_ranks, differing_ranks, score_ranks
from merge_service.techniques.thinning import everywhere, thresholds


def prepare(task: MergeTask, ask: Ask, found: Findings = Findings()) -> Findings:
    """Everything that the blocks of a task depend on besides it. Thresholds that are in `found` already are not looked for."""
    if task.technique.depth and task.merged:
        _ = task.factors  # refuses names that say no depth, before anything is looked at
    params, combine = task.params, task.technique.combine
    found = task.thin.prepare(ask, task, found)
    if combine == "select" and task.inputs:
        if params["density"] < 1:
            found = found.with_(thresholds=_variances(task, ask))
        found = found.with_(gains=_energies(task, ask, found))
    if combine == "balance":
        clamps = thresholds(ask, task, clamp_ranks(params["winsorize"]), found)
        found = found.with_(thresholds=clamps)
        quantity = Quantity("score", wide=True, signed=True, joint=True, given=found)
        scores = everywhere(task, score_ranks(params["density"]))
        found = found.with_(scores=search(scores, ask, quantity, count_frozen=True))
    if len(task.inputs) > 1 and spherical.turns_anything(task.technique, params):
        found = found.with_(turns=_turns(task, ask))
    return found


def _variances(task: MergeTask, ask: Ask) -> dict[Key, Limits]:
    """The least variance over experts that is selected, by tensor; how many are not zero must be counted first."""
    quantity = Quantity("variance", wide=True, joint=True)
    nothing = {(name, 0): (Window(0, 0, 0),) for name in task.group_sizes}
    counted: Any = ask(Count(nothing, quantity=quantity))
    ranks = {
        key: differing_ranks(task.params["density"], int(zeros.bins[0][0])) for key, zeros in counted.items()
    }
    limits = search(ranks, ask, quantity, count_frozen=True)
    return {
        (name, expert.order): Limits(found.low)
        for (name, _), found in limits.items()
        for expert in task.inputs
    }


def _energies(task: MergeTask, ask: Ask, found: Findings) -> dict[tuple[str, int], float]:
    """Squared norms of what is selected, by tensor and expert."""
    sums = ask(Sums((Quantity("energy", wide=True, joint=True, given=found),)))
    assert isinstance(sums, Summed)
    return {
        (name, expert.order): sums.total("energy", name, expert.order)
        for name, _ in task.combined
        for expert in task.inputs
    }


def _turns(task: MergeTask, ask: Ask) -> dict[tuple[str, int], tuple[float, float]]:
    """The factors of every expert in every tensor of a merge along arcs; none where a straight line is taken."""
    grams = ask(Products())
    assert isinstance(grams, Grams)
    found: dict[tuple[str, int], tuple[float, float]] = {}
    for name, gram in grams.by_tensor.items():
        numel = task.reference.tensors[name].numel
        turns = spherical.turns(task.technique, task.params, name, numel, gram)
        found |= {(name, expert.order): turn for expert, turn in zip(task.inputs, turns) if turn is not None}
    return found
