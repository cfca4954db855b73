"""The numbers of whole tensors that a technique needs before any block of it can be made, in the order it needs them.

All of it is asked for with questions whose answers add up over parts of a model, so that one process or many can answer.

Invariant: nothing here touches a block, and what is found is exact.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from merge_service.blocks.thresholds import (
    Ask,
    Count,
    Key,
    Limits,
    Quantity,
    Ranks,
    Summed,
    Sums,
    Window,
    band_ranks,
    clamp_ranks,
    crumb_ranks,
    differing_ranks,
    score_ranks,
    search,
    trim_ranks,
)
from merge_service.techniques.rules import is_trimmed

if TYPE_CHECKING:
    from merge_service.engine.blend import Blend


def look_ahead(blend: "Blend", ask: Ask) -> None:
    """Find thresholds and norms, and leave them in the blend."""
    wide = any(blend.compute(name).itemsize == 8 for name, _ in blend.combined)
    params, combine = blend.params, blend.technique.combine
    ranks = magnitude_ranks(blend)
    if ranks:
        frozen = params.get("count_frozen", True)
        unknown = {key: rank for key, rank in _everywhere(blend, ranks).items() if key not in blend.limits}
        blend.limits |= search(unknown, ask, Quantity(wide=wide), count_frozen=frozen)
    if params.get("rescale") == "l1" and params["density"] < 1:
        _find_gains(blend, ask, wide)
    if is_trimmed(params):
        quantity = Quantity("thinned", wide, given=blend.findings)
        trims = _everywhere(blend, trim_ranks(params["trim"]))
        blend.limits |= search(trims, ask, quantity, count_frozen=True)
    if combine == "select" and blend.inputs:
        if params["density"] < 1:
            _find_variances(blend, ask)
        _find_energies(blend, ask)
    if combine == "balance":
        quantity = Quantity("score", wide=True, signed=True, joint=True, given=blend.findings)
        scores = _everywhere(blend, score_ranks(params["density"]))
        blend.scores |= search(scores, ask, quantity, count_frozen=True)


def magnitude_ranks(blend: "Blend") -> Ranks | None:
    """Which ranks bound the magnitudes of every group and expert; None where nothing is ranked."""
    params, sparsify = blend.params, blend.technique.sparsify
    if params.get("granularity") == "row":
        return None
    if blend.technique.combine == "balance":
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


def _everywhere(blend: "Blend", ranks: Ranks) -> Mapping[Key, Ranks]:
    return {(group, expert.order): ranks for expert in blend.inputs for group in blend.group_sizes}


def _find_gains(blend: "Blend", ask: Ask, wide: bool) -> None:
    """Factors that give every tensor its L1 norm back after a random drop; 1 where nothing is left."""
    sums = ask(Sums((Quantity("magnitude", wide), Quantity("thinned", wide))))
    assert isinstance(sums, Summed)
    for name, _ in blend.combined:
        for expert in blend.inputs:
            whole, left = (sums.total(what, name, expert.order) for what in ("magnitude", "thinned"))
            blend.gains[name, expert.order] = whole / left if left else 1.0


def _find_variances(blend: "Blend", ask: Ask) -> None:
    """The least variance over experts that is selected, by tensor; how many are not zero must be counted first."""
    quantity = Quantity("variance", wide=True, joint=True)
    nothing = {(name, 0): (Window(0, 0, 0),) for name in blend.group_sizes}
    counted: Any = ask(Count(nothing, quantity=quantity))
    ranks = {
        key: differing_ranks(blend.params["density"], int(zeros.bins[0][0])) for key, zeros in counted.items()
    }
    found = search(ranks, ask, quantity, count_frozen=True)
    blend.limits |= {
        (name, expert.order): Limits(limits.low)
        for (name, _), limits in found.items()
        for expert in blend.inputs
    }


def _find_energies(blend: "Blend", ask: Ask) -> None:
    """Squared norms of what is selected, by tensor and expert."""
    sums = ask(Sums((Quantity("energy", wide=True, joint=True, given=blend.findings),)))
    assert isinstance(sums, Summed)
    for name, _ in blend.combined:
        for expert in blend.inputs:
            blend.gains[name, expert.order] = sums.total("energy", name, expert.order)
