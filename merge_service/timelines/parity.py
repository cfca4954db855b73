"""The definitions of TIME's authors (FoMo-in-Flux v1.0), translated into ours, for comparison with their numbers.

What differs: which model SLERP's weight applies to, defaults, where a fold begins, weights that some of their protocols reset,
`logit_scale` without a ceiling, and a first task that offline merging leaves as it is. No other module depends on these
definitions: a translated strategy is written in our own parameters, so fingerprints, lineage and caches are those of an equal
strategy written by hand.

Not copied:

- crashes (a pruned fraction that rounds to no element, averaging with LiNeS, LiNeS on one block)
- lost weights (SLERP of a zero tensor, elements whose votes cancel while the tower's do as well)
- a rank that binary rounding moves by one, and Model Stock's 1e-8 beside norms
- which of two opposite values of equal size MagMax takes

Random masks have the same distribution, not the same draws, and scalars are never dropped.

Source: "How to Merge Your Multimodal Models Over Time?" (arXiv 2412.06712) and the protocols `offline_merge`, `ema_paint`,
`zs_paint` and `double_merge_*` with the values of their configuration.

Invariant: pure and idempotent: a strategy without `parity` comes back unchanged, and every result has none.
"""

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

from merge_service.errors import TechniqueError
from merge_service.techniques.definition import Technique
from merge_service.techniques.params import nearest
from merge_service.techniques.registry import get
from merge_service.techniques.thinning import AtRandom, Band, TopMagnitudes
from merge_service.timelines.time import Strategy, policies

PARITIES = ("fomo_in_flux",)
"""Names of definitions."""
TECHNIQUES = (
    "average", "slerp", "task_arithmetic", "ties", "dare_ties", "breadcrumbs_ties", "magmax",
    "lines_task_arithmetic", "lines_ties", "lines_dare_ties", "lines_breadcrumbs_ties",
    "model_stock", "consensus", "random_mix",
)  # fmt: skip
"""The authors' techniques: their interpolation, tall_masks and random are our average, consensus and random_mix."""
PRUNED = {"fold": Fraction(7, 10), "merge": Fraction(2, 10)}
"""The fraction they drop by default: ema_paint's if a strategy only folds, offline_merge's if it merges all."""
_PAIRS = ("slerp", "model_stock")
_DEFAULTS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"scale": 1.0},
    "consensus": {"scale": 1.0, "min_tasks": 0},
    "model_stock": {"ratio": "raw"},
}
_FIRST_EXPERT = (("latest", "ema"), ("all", "ema"), ("ema", "latest"), ("ema", "all"))


def translate(strategy: Strategy, *, seeded: bool = False) -> tuple[Strategy, list[str]]:
    """The strategy in our own terms, and notes on settings that have no effect in the authors' code.

    `seeded`: `ema_seed` was chosen, so it stays. Raises `TechniqueError` for unknown definitions, and for a technique they lack.
    """
    name, strategy = strategy.parity, replace(strategy, parity=None)
    if name is None:
        return strategy, []
    known(name)
    if strategy.technique is None or not policies(strategy):
        return strategy, [
            f"parity: {name} has no effect: init: {strategy.init} and deploy: {strategy.deploy} merge nothing"
        ]
    technique = _theirs(strategy.technique, name)
    if "all" in policies(strategy) and technique.name in _PAIRS:
        raise TechniqueError(
            f"{technique.name} takes exactly two checkpoints in {name}, so it cannot merge all experts of a stream; use "
            "init/deploy: ema, which folds them one by one"
        )
    kept, notes = _without_reset(strategy, technique, name)
    cell = (strategy.init, strategy.deploy)
    return replace(
        strategy,
        technique=technique.name,
        params=_ours(technique, kept, "merge" if "all" in policies(strategy) else "fold"),
        ema_seed=strategy.ema_seed if seeded or cell not in _FIRST_EXPERT else "first_expert",
        alone="expert" if cell == ("base", "all") else strategy.alone,
    ), notes


def translate_merge(
    technique: str, params: Mapping[str, Any], parity: str | None, count: int
) -> dict[str, Any]:
    """The parameters of one merge of `count` checkpoints, oldest first, in our own terms. Raises `TechniqueError`."""
    if parity is None:
        return dict(params)
    theirs = _theirs(technique, known(parity))
    if theirs.name in _PAIRS and count != 2:
        raise TechniqueError(
            f"{theirs.name} takes exactly two checkpoints in {parity}, not {count}; give two, or leave parity out"
        )
    return _ours(theirs, params, "merge")


def known(parity: str) -> str:
    """`parity`, if there are such definitions. Raises `TechniqueError` naming the nearest ones."""
    if parity not in PARITIES:
        raise TechniqueError(
            f"unknown parity {parity!r}{nearest(str(parity), PARITIES)}; there is {', '.join(PARITIES)}"
        )
    return parity


def _theirs(technique: str, parity: str) -> Technique:
    found = get(technique)
    if found.name not in TECHNIQUES:
        raise TechniqueError(
            f"{parity} has no {found.name}, so there is nothing to be on a par with; it has {', '.join(TECHNIQUES)}"
        )
    return found


def _without_reset(strategy: Strategy, technique: Technique, parity: str) -> tuple[dict[str, Any], list[str]]:
    """The parameters that are set, without the weights of averaging that the protocol makes uniform before every merge.

    offline_merge does so unless a schedule is set, every double_merge_* with `all` always, its folds included.
    """
    params = dict(strategy.params)
    if technique.name != "average" or "all" not in policies(strategy):
        return params, []
    offline = (strategy.init, strategy.deploy) == ("base", "all")
    idle: dict[str, Any] = (
        {"weights": None} if offline else {"weights": None, "schedule": "uniform", "weight": 0.5}
    )
    gone = {name: params.pop(name) for name, plain in idle.items() if params.get(name, plain) != plain}
    return params, [
        f"average: {name} = {value} is not used: with init {strategy.init}, deploy {strategy.deploy} {parity} resets the "
        f"weights to uniform ones before every merge, so {name} is {idle[name]}"
        for name, value in gone.items()
    ]


def _ours(technique: Technique, params: Mapping[str, Any], form: str) -> dict[str, Any]:
    """The parameters in our terms: those that are set, and the authors' defaults where ours differ."""
    given = {name: technique.param(name).validate(value, technique.name) for name, value in params.items()}
    theirs = {"logit_scale": "unclamped", **_DEFAULTS.get(technique.name, {})}
    if technique.thin in (TopMagnitudes, AtRandom, Band):
        outliers = given.get("outliers", technique.param("outliers").default) if technique.thin is Band else 0
        theirs["density"] = _rest(PRUNED[form], outliers)
    if technique.name == "slerp":
        given["weight"] = _rest(given.get("weight", technique.param("weight").default))
    return {**theirs, **given}


def _rest(*parts: float | Fraction) -> float:
    """1 less the sum of decimals as a person wrote them: 0.1 for 0.9."""
    return float(1 - sum(p if isinstance(p, Fraction) else Fraction(repr(p)) for p in parts))
