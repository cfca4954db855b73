"""One or a few experts per element: the largest change, a random one, changes above a threshold, or those with enough users."""

from dataclasses import replace
from typing import Any

from merge_service.blocks.masks import hashes
from merge_service.blocks.questions import Thresholds
from merge_service.techniques.definition import Technique
from merge_service.techniques.params import LOGIT_SCALE, SCALE, SEED, SUM_SCALE, Param
from merge_service.techniques.place import Array, Election, Place, State
from merge_service.techniques.rule import Blocks, Params, Places, Rule, Together, total, widened
from merge_service.techniques.thinning import bounds

THRESHOLD = Param("threshold", "float", 1e-4, "the furthest that a weight may move", 0)
MIN_TASKS = Param("min_tasks", "int", 2, "k: how many experts at least must use a weight for it to move", 0)
TALL_LAMBDA = Param(
    "tall_lambda",
    "float",
    0.4,
    "an expert uses a weight where |τ_i| > tall_lambda · |Σ_j τ_j - τ_i|; the authors search 0.2 to 0.6 per task, TIME has 0.4",
    0,
)


class Largest(Rule):
    """Per element the task vector of largest magnitude; of equal magnitudes the later expert's."""

    floats = ("largest",)
    kernel = "largest"

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        held = state["largest"]
        state["largest"] = xp.where(xp.abs(x) >= xp.abs(held), x, held)

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        return state["largest"], Election()


class Draw(Rule):
    """Per element the task vector of the expert with the highest hash; of equal hashes the larger value."""

    floats = ("drawn",)
    words = ("hash",)
    masks_scalars = True

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        assert place.key is not None
        held, high = state["drawn"], state["hash"]
        new = hashes(xp, place.key, place.start, x)
        taken = (new > high) | ((new == high) & (x > held)) if place.order > 1 else new >= 0
        state["drawn"], state["hash"] = xp.where(taken, x, held), xp.where(taken, new, high)

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        return state["drawn"], Election()


class Contributors(Rule):
    """RAM: the mean over the experts that moved an element further than `threshold`."""

    floats = ("sum",)
    words = ("count",)

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.thresholds = Thresholds(0, params["threshold"])

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        moved = xp.abs(x) > bounds(self.thresholds, x.dtype)[1]
        state["sum"] = state["sum"] + xp.where(moved, x, 0)
        state["count"] = state["count"] + xp.where(moved, 1, 0)

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        count, added = state["count"], state["sum"]
        return added / xp.asarray(xp.where(count > 1, count, 1), dtype=added.dtype), Election()


class Agreed(Together):
    """Consensus merging: the sum where enough experts use an element (TALL masks, arXiv 2405.07813, eq. 4 to 6)."""

    adds = True

    def combined(self, xp: Any, blocks: Blocks, places: Places) -> Array:
        added, share = total(xp, blocks), self.params["tall_lambda"]
        users = sum(
            xp.asarray(xp.abs(tau) > share * xp.abs(added - tau), dtype=xp.int64)
            for tau in widened(xp, blocks)
        )
        return xp.where(users >= self.params["min_tasks"], added, 0)


class NearSwap(Together):
    """The first model, moved towards the second by `threshold` at most (MergeKit: interpolation by threshold / |gap|)."""

    def combined(self, xp: Any, blocks: Blocks, places: Places) -> Array:
        running, new = blocks
        gap, most = running - new, self.params["threshold"]
        arrived = (xp.abs(gap) <= most) & (gap != 0)
        return xp.where(arrived, new, running - xp.clip(gap, -most, most))


TECHNIQUES = (
    Technique(
        "magmax",
        "θ = θ0 + scale · τ_i*, i* = argmax_i |τ_i| per element; of equal magnitudes the later expert wins",
        "MagMax, arXiv 2407.06322",
        (SCALE, LOGIT_SCALE),
        unweighed="every weight is that of one expert, the one that moved it most",
        rule=Largest,
    ),
    Technique(
        "random_mix",
        "θ = θ0 + scale · τ_i, i = argmax_i hash(seed, expert i, element): every expert is as likely",
        "baseline of MagMax, arXiv 2407.06322",
        (SEED, SCALE, LOGIT_SCALE),  # scale 1: the authors' script
        unweighed="every expert is as likely in every weight",
        rule=Draw,
    ),
    Technique(
        "ram",
        "θ = θ0 + scale · mean of the τ_i with |τ_i| > threshold",
        "Reinforced agent merging, arXiv 2601.13572",
        (
            replace(THRESHOLD, default=1e-5, doc="changes of a weight up to this size count as none"),
            SCALE,
            LOGIT_SCALE,
        ),
        unweighed="a weight is the plain mean of the experts that changed it",
        rule=Contributors,
        breaks={"P2": "changes up to threshold are dropped", "P7": "threshold is absolute"},
    ),
    Technique(
        "consensus",
        "θ = θ0 + scale · Σ_i τ_i where at least min_tasks experts have |τ_i| > tall_lambda · |Σ_j τ_j - τ_i|, else θ0",
        "Consensus merging with TALL masks, arXiv 2405.07813",
        # scale as task_arithmetic, which this is at min_tasks 0; min_tasks 2: the authors' prun_thre_k. More than N: base.
        (TALL_LAMBDA, MIN_TASKS, SUM_SCALE, LOGIT_SCALE),
        unweighed="who uses a weight is counted against the plain sum of all experts",
        rule=Agreed,
        forms=frozenset({"merge", "fold"}),
        breaks={
            "P2": "copies of one expert add up unless scale * N = 1",
            "P5": "who uses a weight depends on the final sum",
            "P10": "a sum leaves the convex hull",
        },
    ),
    Technique(
        "nearswap",
        "θ = running + clip(new - running, -threshold, threshold)",
        "NearSwap as in MergeKit, arXiv 2403.13257",
        (THRESHOLD, LOGIT_SCALE),
        unweighed="it takes a running model and a new one; threshold says how far the new one counts",
        rule=NearSwap,
        space="weights",
        forms=frozenset({"merge", "fold"}),
        arity=2,
        breaks={
            "P3": "the second checkpoint is the new one",
            "P4": "takes exactly two",
            "P5": "takes exactly two",
            "P7": "threshold is absolute",
        },
    ),
)
