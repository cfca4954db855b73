"""Statistics over whole tensors (thresholds, norms, angles) that must be known before a block can be made.

All of it is asked for with questions whose answers add up over parts of a model, so that one process or many can answer.

Invariant: nothing here touches a block, and what is found is exact.
"""

from collections.abc import Mapping
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
    Ranks,
    Summed,
    Sums,
    Window,
)
from merge_service.blocks.search import search
from merge_service.engine.task import MergeTask
from merge_service.techniques import spherical
from merge_service.techniques.ranks import (
    band_ranks,
    clamp_ranks,
    crumb_ranks,
    differing_ranks,
    score_ranks,
    trim_ranks,
)
from merge_service.techniques.rules import is_trimmed


def prepare(task: MergeTask, ask: Ask, found: Findings = Findings()) -> Findings:
    """Everything that the blocks of a task depend on besides it. Thresholds that are in `found` already are not looked for."""
    if task.technique.depth and task.merged:
        _ = task.factors  # refuses names that say no depth, before anything is looked at
    wide = any(task.compute(name).itemsize == 8 for name, _ in task.combined)
    params, combine = task.params, task.technique.combine
    ranks = magnitude_ranks(task)
    if ranks:
        frozen = params.get("count_frozen", True)
        unknown = {key: rank for key, rank in _everywhere(task, ranks).items() if key not in found.thresholds}
        found = found.with_(thresholds=search(unknown, ask, Quantity(wide=wide), count_frozen=frozen))
    if params.get("rescale") == "l1" and params["density"] < 1:
        found = found.with_(gains=_gains(task, ask, found, wide))
    if is_trimmed(params):
        quantity = Quantity("thinned", wide, given=found)
        trims = _everywhere(task, trim_ranks(params["trim"]))
        found = found.with_(thresholds=search(trims, ask, quantity, count_frozen=True))
    if combine == "select" and task.inputs:
        if params["density"] < 1:
            found = found.with_(thresholds=_variances(task, ask))
        found = found.with_(gains=_energies(task, ask, found))
    if combine == "balance":
        quantity = Quantity("score", wide=True, signed=True, joint=True, given=found)
        scores = _everywhere(task, score_ranks(params["density"]))
        found = found.with_(scores=search(scores, ask, quantity, count_frozen=True))
    if len(task.inputs) > 1 and spherical.turns_anything(task.technique, params):
        found = found.with_(turns=_turns(task, ask))
    return found


def magnitude_ranks(task: MergeTask) -> Ranks | None:
    """Which ranks bound the magnitudes of every group and expert; None where nothing is ranked."""
    params, sparsify = task.params, task.technique.sparsify
    if params.get("granularity") == "row":
        return None
    if task.technique.combine == "balance":
        return clamp_ranks(params["winsorize"])
    if sparsify == "magnitude":
        ranks = trim_ranks(params["density"])
    elif sparsify == "band":
        ranks = band_ranks(params["density"], params["outliers"])
    elif sparsify == "crumbs":
        ranks = crumb_ranks(params["density"], params["outliers"])
    else:
        return None
    return None if ranks(10**9) == (None, None) else ranks


def _everywhere(task: MergeTask, ranks: Ranks) -> Mapping[Key, Ranks]:
    return {(group, expert.order): ranks for expert in task.inputs for group in task.group_sizes}


def _gains(task: MergeTask, ask: Ask, found: Findings, wide: bool) -> dict[tuple[str, int], float]:
    """Factors that give every tensor its L1 norm back after a random drop; 1 where nothing is left."""
    quantities = Quantity("magnitude", wide, given=found), Quantity("thinned", wide, given=found)
    sums = ask(Sums(quantities))
    assert isinstance(sums, Summed)
    gains = {}
    for name, _ in task.combined:
        for expert in task.inputs:
            whole, left = (sums.total(what, name, expert.order) for what in ("magnitude", "thinned"))
            gains[name, expert.order] = whole / left if left else 1.0
    return gains


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
