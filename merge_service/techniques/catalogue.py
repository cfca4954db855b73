"""The techniques that work element by element: one literal table of objects.

Where published implementations disagree a parameter chooses, and its text says who does what; a default is its authors'.

Invariant: a technique that breaks one of the common laws (P1 to P16, tests/merge_service/techniques/test_properties.py) declares it
here, and nothing else is exempt.
"""

from dataclasses import replace

from merge_service.techniques.definition import (
    AVERAGING,
    CONSENSUS,
    COUNT_FROZEN,
    DENSITY,
    GRANULARITY,
    LINES,
    LOGIT_SCALE,
    OUTLIERS,
    SCALE,
    SEED,
    WEIGHT,
    Technique,
)
from merge_service.techniques.joint import Agreed, Balance, NearSwap, Selection
from merge_service.techniques.params import Param
from merge_service.techniques.rules import Contributors, Draw, Largest, Mean, Sum, elected
from merge_service.techniques.spherical import Slerp
from merge_service.techniques.thinning import AtRandom, Band, ByRank, Crumbs, TopMagnitudes

HALF = Param("density", "float", 0.5, "fraction of every task vector that is kept", 0, 1, above_low=True)
RESCALE = Param(
    "rescale",
    "choice",
    "expectation",
    "how what is kept makes up for what is dropped. expectation: divided by the probability of being kept (the papers, "
    "MergeLM, FusionBench, TIME, DELLA's own code); l1: every tensor gets its L1 norm back (MergeKit)",
    choices=("expectation", "l1"),
)
TRIM = Param(
    "trim",
    "float",
    1.0,
    "fraction of largest magnitudes that a second, TIES-like trim keeps after the random drop, zeros counted. "
    "1: none (TIME, MergeKit); FusionBench and MergeLM have 0.2",
    0,
    1,
    above_low=True,
)
EPSILON = Param(
    "epsilon",
    "float",
    0.15,
    "keep probabilities go from density - epsilon (smallest magnitude of a row) to density + epsilon (largest)",
    0,
    0.5,
)
THRESHOLD = Param("threshold", "float", 1e-4, "the furthest that a weight may move", 0)
MIN_TASKS = Param("min_tasks", "int", 2, "k: how many experts at least must use a weight for it to move", 0)
TALL_LAMBDA = Param(
    "tall_lambda",
    "float",
    0.4,
    "an expert uses a weight where |τ_i| > tall_lambda · |Σ_j τ_j - τ_i|; the authors search 0.2 to 0.6 per task, TIME has 0.4",
    0,
)
GRANULARITY_ROW = replace(
    GRANULARITY,
    default="row",
    doc="over what magnitudes are ranked: row is the last dimension (the released code), tensor is MergeKit's",
    choices=("model", "tower", "tensor", "row"),
)
_SCALE_SUM = replace(SCALE, default=0.3)

_TIES_PAPER = "TIES-Merging, arXiv 2306.01708"
_DARE_PAPER = "DARE, arXiv 2311.03099; with TIES election as in TIME, arXiv 2412.06712"
_CRUMBS_PAPER = "Model Breadcrumbs, arXiv 2312.06795; with TIES election as in TIME, arXiv 2412.06712"
_LINES_PAPER = "LiNeS, arXiv 2410.17146, on top of "
_ELECT = "θ = θ0 + scale · {how}{{τ̂_i : sign(τ̂_i) = sign(Σ_j τ̂_j)}}"
_NOT_IDENTITY = {"P2": "copies of one expert give its thinned-out task vector, not the expert"}
_SUMS = {"P2": "copies of one expert add up unless scale * N = 1", "P10": "a sum leaves the convex hull"}

_PAIR = {
    "P3": "the second checkpoint is the new one",
    "P4": "takes exactly two",
    "P5": "takes exactly two",
}

_TRIM = (DENSITY, CONSENSUS, GRANULARITY, COUNT_FROZEN)
_DROP = (DENSITY, RESCALE, SEED, CONSENSUS, TRIM, GRANULARITY)
_BAND = (DENSITY, OUTLIERS, CONSENSUS, GRANULARITY, COUNT_FROZEN)

_PLAIN = (
    Technique(
        "average",
        "θ = Σ w_i θ_i / Σ w_i;  fold: θ = (1 - weight) · running + weight · new",
        "Model soups, arXiv 2203.05482; weights that grow with time as in TIME, arXiv 2412.06712",
        (*AVERAGING[1:], replace(WEIGHT, forms=frozenset({"fold"})), LOGIT_SCALE),
        combine=Mean,
        space="weights",
    ),
    Technique(
        "slerp",
        "θ = [sin((1-w)Ω) running + sin(wΩ) new] / sin Ω per tensor, cos Ω = <running, new> / (|running| |new|)",
        "Shoemake 1985; as in MergeKit, arXiv 2403.13257, with w on the new model",
        (WEIGHT, LOGIT_SCALE),
        combine=Slerp,
        space="weights",
        forms=frozenset({"merge", "fold"}),
        arity=2,
        exceptions={
            **_PAIR,
            "P7": "acts on weights, not on task vectors",
            "P8": "acts on weights, not on task vectors",
            "P9": "acts on weights, not on task vectors",
            "P10": "follows the arc, outside the chord",
        },
    ),
    Technique(
        "task_arithmetic",
        "θ = θ0 + scale · Σ_i τ_i",
        "Task arithmetic, arXiv 2212.04089",
        (_SCALE_SUM, LOGIT_SCALE),
        combine=Sum,
        adds=True,
        exceptions=_SUMS,
    ),
    Technique(
        "ties",
        "τ̂_i = τ_i where |τ_i| is in the top density, else 0;  " + _ELECT.format(how="mean"),
        _TIES_PAPER,
        (*_TRIM, SCALE, LOGIT_SCALE),
        combine=elected,
        thin=TopMagnitudes,
        exceptions=_NOT_IDENTITY,
    ),
    Technique(
        "dare_ties",
        "τ̂_i = τ_i / density with probability density, else 0;  " + _ELECT.format(how="mean"),
        _DARE_PAPER,
        (*_DROP, SCALE, LOGIT_SCALE),
        combine=elected,
        thin=AtRandom,
        exceptions=_NOT_IDENTITY | {"P10": "kept values are divided by density"},
    ),
    Technique(
        "breadcrumbs_ties",
        "τ̂_i = τ_i without its smallest (1 - density - outliers) and largest (outliers) magnitudes;  "
        + _ELECT.format(how="mean"),
        _CRUMBS_PAPER,
        (*_BAND, SCALE, LOGIT_SCALE),
        combine=elected,
        thin=Band,
        exceptions=_NOT_IDENTITY,
    ),
    Technique(
        "magmax",
        "θ = θ0 + scale · τ_i*, i* = argmax_i |τ_i| per element; of equal magnitudes the later expert wins",
        "MagMax, arXiv 2407.06322",
        (SCALE, LOGIT_SCALE),
        combine=Largest,
    ),
)

_FURTHER = (
    Technique(
        "breadcrumbs",
        "θ = θ0 + scale · Σ_i m_i τ_i, m_i = 0 on the outliers largest magnitudes of n, 1 on the next density · n, else 0",
        "Model Breadcrumbs, arXiv 2312.06795",
        # density, outliers, scale: where the authors' search starts (keep .15, remove .006, alpha .2).
        (
            replace(HALF, default=0.15),
            replace(OUTLIERS, default=0.006),
            GRANULARITY_ROW,
            COUNT_FROZEN,
            replace(SCALE, default=0.2),
            LOGIT_SCALE,
        ),
        combine=Sum,
        thin=Crumbs,
        adds=True,
        exceptions={"P2": "copies of one expert add up, thinned out", "P10": "a sum leaves the convex hull"},
    ),
    Technique(
        "dare",
        "θ = θ0 + scale · Σ_i τ̂_i, τ̂_i = τ_i / density with probability density, else 0",
        "DARE, arXiv 2311.03099",
        # density, scale: FusionBench's DareTaskArithmetic for CLIP (sparsity .5, scaling .3); papers drop up to .9.
        (HALF, RESCALE, SEED, _SCALE_SUM, LOGIT_SCALE),
        combine=Sum,
        thin=AtRandom,
        adds=True,
        exceptions={
            "P2": "copies of one expert are dropped apart and add up",
            "P10": "kept values are divided by density",
        },
    ),
    # dare_ties: gains RESCALE after density and TRIM after consensus; nothing else changes, defaults keep today's result.
    #   _DROP = (DENSITY, RESCALE, SEED, CONSENSUS, TRIM, GRANULARITY)
    Technique(
        "della",
        "τ̂_i = τ_i / p with probability p, else 0; p = density ± epsilon by the rank of |τ_i| in its row;  "
        + _ELECT.format(how="mean"),
        "DELLA-Merging, arXiv 2406.11617",
        # epsilon: MergeKit's default; consensus mean: MergeKit (normalize) and the paper; density .5 leaves room for epsilon.
        (HALF, EPSILON, RESCALE, SEED, CONSENSUS, GRANULARITY, SCALE, LOGIT_SCALE),
        combine=elected,
        thin=ByRank,
        exceptions={**_NOT_IDENTITY, "P10": "kept values are divided by their probability"},
    ),
    Technique(
        "della_linear",
        "θ = θ0 + scale · Σ_i τ̂_i, τ̂_i = τ_i / p with probability p, else 0; p = density ± epsilon by the rank of |τ_i| in "
        "its row",
        "DELLA-Merging, arXiv 2406.11617; summed as in MergeKit, arXiv 2403.13257",
        (HALF, EPSILON, RESCALE, SEED, _SCALE_SUM, LOGIT_SCALE),
        combine=Sum,
        thin=ByRank,
        adds=True,
        exceptions={
            "P2": "copies of one expert are dropped apart and add up",
            "P10": "kept values are divided by their probability",
        },
    ),
    Technique(
        "sce",
        "θ = θ0 + scale · Σ_i w_i τ̂_i / Σ_i w_i over i with sign(τ̂_i) = sign(Σ_j τ̂_j); w_i = |τ̂_i|²; τ̂_i = τ_i where the "
        "variance over experts is in the top density of its tensor, else 0",
        "SCE in FuseChat, arXiv 2408.07990",
        # density: the authors' configuration (select_topk .1); MergeKit's default is 1, which selects everything.
        (
            Param(
                "density",
                "float",
                0.1,
                "fraction of the positions where experts differ that is selected",
                0,
                1,
                above_low=True,
            ),
            Param(
                "erase_unselected",
                "bool",
                True,
                "whether positions not selected stay at the base (MergeKit) or only do not count in the weights (FuseAI's code)",
            ),
            SCALE,
            LOGIT_SCALE,
        ),
        combine=Selection,
        forms=frozenset({"merge", "fold"}),
        exceptions={
            "P5": "the positions selected depend on all experts",
            "P8": "votes that cancel exactly go to plus, as in the reference",
        },
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
        combine=Contributors,
        exceptions={"P2": "changes up to threshold are dropped", "P7": "threshold is absolute"},
    ),
    Technique(
        "nearswap",
        "θ = running + clip(new - running, -threshold, threshold)",
        "NearSwap as in MergeKit, arXiv 2403.13257",
        (THRESHOLD, LOGIT_SCALE),
        combine=NearSwap,
        space="weights",
        forms=frozenset({"merge", "fold"}),
        arity=2,
        exceptions={**_PAIR, "P7": "threshold is absolute"},
    ),
    Technique(
        "random_mix",
        "θ = θ0 + scale · τ_i, i = argmax_i hash(seed, expert i, element): every expert is as likely",
        "baseline of MagMax, arXiv 2407.06322",
        (SEED, SCALE, LOGIT_SCALE),  # scale 1: the authors' script
        combine=Draw,
    ),
    Technique(
        "consensus",
        "θ = θ0 + scale · Σ_i τ_i where at least min_tasks experts have |τ_i| > tall_lambda · |Σ_j τ_j - τ_i|, else θ0",
        "Consensus merging with TALL masks, arXiv 2405.07813",
        # scale as task_arithmetic, which this is at min_tasks 0; min_tasks 2: the authors' prun_thre_k. More than N: base.
        (TALL_LAMBDA, MIN_TASKS, _SCALE_SUM, LOGIT_SCALE),
        combine=Agreed,
        forms=frozenset({"merge", "fold"}),
        adds=True,
        exceptions={**_SUMS, "P5": "who uses a weight depends on the final sum"},
    ),
    Technique(
        "pcb",
        "θ = θ0 + scale · Σ_i s_i τ̂_i / Σ_i s_i; s_i in [0, 1]: rank above the (1 - density) quantile of "
        "exp(N · |τ̂_i|²) · tanh(τ_i Σ_j τ_j), |τ̂_i| scaled to [0, 1]",
        "Parameter competition balancing, arXiv 2410.02396",
        (
            replace(
                HALF, default=0.1, doc="fraction of every task vector with the highest scores that counts"
            ),
            Param(
                "winsorize",
                "float",
                1e-4,
                "fraction of smallest and of largest magnitudes set to the nearest one within; pcb-merging.py has 1e-4, the "
                "authors' vision code 0.01",
                0,
                0.49,
            ),
            Param(
                "inter_balance",
                "choice",
                "sum",
                "agreement between experts: sum is tanh(τ_i Σ_j τ_j) (pcb-merging.py), pairs is Σ_j tanh(τ̄_i τ̄_j) of task "
                "vectors scaled to [-1, 1] (the vision code with search)",
                choices=("sum", "pairs"),
            ),
            GRANULARITY,
            SCALE,  # the authors' lambda: 1.2 fixed, searched from 1.0
            LOGIT_SCALE,
        ),
        combine=Balance,
        forms=frozenset({"merge", "fold"}),
        exceptions={
            "P2": "copies of one expert give the part of it that scores high",
            "P5": "scores depend on all experts",
            "P7": "tanh of an absolute magnitude",
            "P10": "the smallest magnitudes are raised",
        },
    ),
    Technique(
        "wise_ft",
        "θ = (1 - weight) · θ0 + weight · mean_i θ_i",
        "WiSE-FT, arXiv 2109.01903",
        (
            Param("weight", "float", 0.5, "weight of the experts' mean; the base gets 1 - weight", 0, 1),
            LOGIT_SCALE,
        ),
        combine=Mean,
        space="task_vectors",
        factor="weight",
        forms=frozenset({"merge", "stream"}),  # in a fold `weight` is the new expert's: that is `average`
        exceptions={"P2": "copies of one expert are drawn to the base unless weight is 1"},
    ),
)


def _with_lines(technique: Technique) -> Technique:
    """The same technique with LiNeS: factors that grow with depth replace `scale`."""
    params = tuple(p for p in technique.params if p.name not in ("scale", "logit_scale"))
    return Technique(
        f"lines_{technique.name}",
        technique.formula.replace("scale", "g(layer)")
        + ";  g = lines_alpha + lines_beta · shape(layer / (L - 1)), outside blocks g = lines_alpha",
        _LINES_PAPER + technique.paper,
        (*params, *LINES, LOGIT_SCALE),
        combine=technique.combine,
        thin=technique.thin,
        depth=True,
        adds=technique.adds,
        exceptions={**technique.exceptions, "P2": "every layer is scaled by its depth"},
    )


_LINED = ("task_arithmetic", "ties", "dare_ties", "breadcrumbs_ties")
ELEMENTWISE = (*_PLAIN, *(_with_lines(t) for t in _PLAIN if t.name in _LINED), *_FURTHER)
