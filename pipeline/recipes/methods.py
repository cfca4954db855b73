"""mergekit's merge methods in our terms: which technique each is, and what its parameters become.

Where mergekit and the papers differ, the translation follows mergekit: thresholds and majorities per tensor, a raw ratio of Model
Stock, L1 norms restored after random drops.

Invariant: a parameter of mergekit either becomes one of ours or is refused with the reason; none is left out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.recipes.settings import Scalar, When

Rules = tuple[When, ...]
Said = tuple[dict[str, Rules], dict[str, tuple[Rules, ...]]]
"""Shared parameters, and those of single experts, in our terms."""
TENSOR = (When(None, "tensor"),)


@dataclass(frozen=True)
class Spoken:
    """Parameters in mergekit's terms, their rules with all levels in order: shared ones, and those of the inputs called `names`."""

    shared: Mapping[str, Rules]
    own: Mapping[str, tuple[Rules, ...]]
    names: tuple[str, ...]
    base: str | None

    def get(self, name: str, default: Scalar) -> Rules:
        """A shared parameter with its default last."""
        return (*self.shared.get(name, ()), When(None, default))

    def of_inputs(self, name: str, default: Scalar | None = None) -> tuple[Rules, ...]:
        """A parameter of every input. Raises ValueError if one has none and there is no default."""
        last = () if default is None else (When(None, default),)
        found = tuple((*one, *last) for one in self.own[name])
        lacking = [
            model for model, one in zip(self.names, found) if not any(rule.part is None for rule in one)
        ]
        if lacking:
            raise ValueError(
                f"{lacking[0]} has no {name}{' for all tensors' if self.own[name] else ''}; give it one"
            )
        return found


@dataclass(frozen=True)
class Method:
    """A method: our technique, its shared parameters and those of inputs, and `say`, which translates them.

    `moves`: task vectors of a base are merged, and the base is no input. `keeps_base`: the base gives the output's files, and may be
    an input too. `inputs`: how many there must be. `base_first`: the base is the first of two.
    """

    technique: str
    shared: tuple[str, ...]
    own: tuple[str, ...]
    say: Callable[[Spoken], Said]
    moves: bool = False
    keeps_base: bool = False
    base_first: bool = False
    inputs: int | None = None

    @property
    def knows(self) -> tuple[str, ...]:
        """All parameters that have an effect."""
        return (*self.shared, *self.own)

    def check(self, name: str, spoken: Spoken) -> None:
        """Raise ValueError for a wrong number of models, or a base that lacks."""
        if self.inputs is not None and len(spoken.names) != self.inputs:
            raise ValueError(
                f"{name} takes {self.inputs} models{' besides the base' if self.moves else ''}, not {len(spoken.names)}"
            )
        if (
            (self.moves or self.base_first)
            and spoken.base is None
            and self.technique not in ("nuslerp", "multislerp")
        ):
            raise ValueError(f"{name} needs a base_model")
        if not spoken.names:
            raise ValueError(f"{name} needs a model besides the base")


def _linear(spoken: Spoken) -> Said:
    weights = spoken.of_inputs("weight")
    normalize = only(spoken.get("normalize", True), "normalize")
    numbers = [alone(one) for one in weights]
    if normalize and not any(isinstance(one, int | float) and one < 0 for one in numbers):
        return {}, {"weight": weights}
    if any(not isinstance(one, int | float) or isinstance(one, bool) for one in numbers):
        raise ValueError(
            "linear with normalize: false, or with negative weights, needs one number for each model"
        )
    known = [float(one) for one in numbers if one is not None]
    total = sum(known) if normalize else 1.0
    if not total:
        raise ValueError("the weights of linear add up to 0")
    factors = [When(None, len(known) * one / total) for one in known]
    return {}, {"factor": tuple((one,) for one in factors)}


def _slerp(spoken: Spoken) -> Said:
    if not spoken.shared["t"]:
        raise ValueError("slerp has no t; give it one")
    return {"weight": spoken.shared["t"]}, {}


def _nuslerp(spoken: Spoken) -> Said:
    if only(spoken.get("nuslerp_row_wise", False), "nuslerp_row_wise") or not only(
        spoken.get("nuslerp_flatten", True), "nuslerp_flatten"
    ):
        raise ValueError(
            "nuslerp by rows or columns cannot be done; only nuslerp_flatten: true, which turns whole tensors"
        )
    return _space(spoken), {"weight": spoken.of_inputs("weight")}


def _multislerp(spoken: Spoken) -> Said:
    if not only(spoken.get("normalize_weights", True), "normalize_weights"):
        raise ValueError("multislerp with normalize_weights: false cannot be done; its weights are shares")
    return _space(spoken), {"weight": spoken.of_inputs("weight")}


def _space(spoken: Spoken) -> dict[str, Rules]:
    return {"space": (When(None, "task_vectors"),)} if spoken.base else {}


def _karcher(spoken: Spoken) -> Said:
    return {"iterations": spoken.get("max_iter", 10), "tolerance": spoken.get("tol", 1e-5)}, {}


def _nearswap(spoken: Spoken) -> Said:
    if not spoken.shared["t"]:
        raise ValueError("nearswap has no t; give it one")
    return {"threshold": spoken.shared["t"]}, {}


def _stock(spoken: Spoken) -> Said:
    if only(spoken.get("filter_wise", False), "filter_wise"):
        raise ValueError(
            "model_stock with filter_wise: true cannot be done; its ratio is one for each tensor"
        )
    if len(spoken.names) < 2:
        raise ValueError("model_stock needs at least two models besides the base")
    return {"ratio": (When(None, "raw"),)}, {}


def _sce(spoken: Spoken) -> Said:
    return {"density": spoken.get("select_topk", 1.0)}, {}


def _ram(spoken: Spoken) -> Said:
    return {"threshold": spoken.get("epsilon", 1e-5)}, {}


def _passthrough(spoken: Spoken) -> Said:
    return {}, {"factor": spoken.own["scale"]} if any(spoken.own["scale"]) else {}


def _task_arithmetic(spoken: Spoken) -> Said:
    return {"scale": spoken.get("lambda", 1.0)}, {"weight": _divided(spoken)}


def _ties(spoken: Spoken) -> Said:
    _refuse_rescaling(spoken, False)
    return _elected(spoken, True), {
        "weight": spoken.of_inputs("weight"),
        "density": spoken.of_inputs("density", 1.0),
    }


def _dare(spoken: Spoken) -> Said:
    shared, own = _task_arithmetic(spoken)
    return shared | {"rescale": _l1(spoken)}, own | {"density": spoken.of_inputs("density", 1.0)}


def _dare_ties(spoken: Spoken) -> Said:
    return _elected(spoken, False) | {"rescale": _l1(spoken)}, {
        "weight": spoken.of_inputs("weight"),
        "density": spoken.of_inputs("density", 1.0),
    }


def _breadcrumbs(spoken: Spoken) -> Said:
    _refuse_rescaling(spoken, False)
    shared, own = _task_arithmetic(spoken)
    return shared | {"granularity": TENSOR}, own | _crumbs(spoken)


def _breadcrumbs_ties(spoken: Spoken) -> Said:
    _refuse_rescaling(spoken, False)
    return _elected(spoken, False), {"weight": spoken.of_inputs("weight")} | _crumbs(spoken)


def _della(spoken: Spoken) -> Said:
    return _elected(spoken, True) | {"rescale": _l1(spoken)}, {
        "weight": spoken.of_inputs("weight"),
        **_ranked(spoken),
    }


def _della_linear(spoken: Spoken) -> Said:
    shared, own = _task_arithmetic(spoken)
    return shared | {"rescale": _l1(spoken)}, own | _ranked(spoken)


def _ranked(spoken: Spoken) -> dict[str, tuple[Rules, ...]]:
    return {"density": spoken.of_inputs("density", 1.0), "epsilon": spoken.of_inputs("epsilon", 0.15)}


def _crumbs(spoken: Spoken) -> dict[str, tuple[Rules, ...]]:
    """Density and outliers; mergekit removes fewer outliers where both would be more than everything."""
    densities, gammas = spoken.of_inputs("density", 1.0), spoken.of_inputs("gamma", 0.01)
    outliers: list[Rules] = []
    for density, gamma in zip(densities, gammas):
        kept, removed = alone(density), alone(gamma)
        if kept is not None and removed is not None:
            outliers.append((When(None, max(0.0, min(float(removed), round(1 - float(kept), 12)))),))
        else:
            outliers.append(gamma)
    return {"density": densities, "outliers": tuple(outliers)}


def _consensus(spoken: Spoken, default: bool) -> Rules:
    """`normalize`: the agreeing values divided by their weights, which is their mean if the weights are equal."""
    return changed(spoken.get("normalize", default), lambda value: "mean" if value else "sum")


def _elected(spoken: Spoken, normalize: bool) -> dict[str, Any]:
    """What all elections of signs have in common; `normalize` is the method's default.

    mergekit divides agreeing values by the sum of their weights with their signs, which turns a value of negative weight around.
    """
    numbers = [value for one in spoken.of_inputs("weight") for value in spelled(one)]
    if any(isinstance(one, int | float) and one < 0 for one in numbers) and any(
        spelled(spoken.get("normalize", normalize))
    ):
        raise ValueError(
            "normalize: true with a negative weight divides by weights of both signs, which cannot be done; set normalize: false"
        )
    return {
        "scale": spoken.get("lambda", 1.0),
        "consensus": _consensus(spoken, normalize),
        "granularity": TENSOR,
    }


def _divided(spoken: Spoken) -> tuple[Rules, ...]:
    """The weights of a sum; with `normalize` divided by their total."""
    weights = spoken.of_inputs("weight")
    if not only(spoken.get("normalize", False), "normalize"):
        return weights
    numbers = [alone(one) for one in weights]
    if any(one is None for one in numbers) or abs(sum(float(one or 0) for one in numbers)) < 1e-8:
        raise ValueError(
            "normalize: true needs one number for each model as weight, which do not add up to 0"
        )
    total = sum(float(one or 0) for one in numbers)
    return tuple((When(None, float(one or 0) / total),) for one in numbers)


def _l1(spoken: Spoken) -> Rules:
    _refuse_rescaling(spoken, True)
    return (When(None, "l1"),)


def _refuse_rescaling(spoken: Spoken, wanted: bool) -> None:
    """Raise ValueError for a rescaling that does not exist here, unless nothing is dropped."""
    if all(alone(one) == 1 for one in spoken.of_inputs("density", 1.0)):
        return
    if only(spoken.get("rescale", wanted), "rescale") is not wanted:
        raise ValueError(f"rescale: {str(not wanted).lower()} cannot be done for this method; leave it out")


def spelled(found: Rules) -> list[Scalar]:
    """Every value that some tensor may have: a rule for all names hides those behind it."""
    answer: list[Scalar] = []
    for one in found:
        answer += one.value if isinstance(one.value, tuple) else (one.value,)
        if one.part is None:
            break
    return answer


def alone(found: Rules) -> Scalar | None:
    """The value that all tensors have, None if they differ."""
    first = found[0] if found else None
    return None if first is None or first.part is not None or isinstance(first.value, tuple) else first.value


def only(found: Rules, name: str) -> Scalar:
    """The value that all tensors have. Raises ValueError if they differ."""
    value = alone(found)
    if value is None:
        raise ValueError(f"{name} differs between tensors, which cannot be done; give one value")
    return value


def changed(found: Rules, change: Callable[[Any], Scalar]) -> Rules:
    """Rules with every value changed."""
    return tuple(
        replace(
            one, value=tuple(map(change, one.value)) if isinstance(one.value, tuple) else change(one.value)
        )
        for one in found
    )


_SUM = ("int8_mask", "normalize", "rescale", "lambda")
_OWN = ("weight", "density")
METHODS: Mapping[str, Method] = {
    "linear": Method("average", ("normalize",), ("weight",), _linear, keeps_base=True),
    "slerp": Method("slerp", ("t",), (), _slerp, base_first=True, inputs=2),
    "nuslerp": Method(
        "nuslerp", ("nuslerp_row_wise", "nuslerp_flatten"), ("weight",), _nuslerp, moves=True, inputs=2
    ),
    "multislerp": Method("multislerp", ("normalize_weights", "eps"), ("weight",), _multislerp, moves=True),
    "karcher": Method("karcher", ("max_iter", "tol"), (), _karcher, keeps_base=True),
    "task_arithmetic": Method(
        "task_arithmetic", ("int8_mask", "normalize", "lambda"), ("weight",), _task_arithmetic, moves=True
    ),
    "ties": Method("ties", _SUM, _OWN, _ties, moves=True),
    "dare_linear": Method("dare", _SUM, _OWN, _dare, moves=True),
    "dare_ties": Method("dare_ties", _SUM, _OWN, _dare_ties, moves=True),
    "breadcrumbs": Method("breadcrumbs", _SUM, (*_OWN, "gamma"), _breadcrumbs, moves=True),
    "breadcrumbs_ties": Method("breadcrumbs_ties", _SUM, (*_OWN, "gamma"), _breadcrumbs_ties, moves=True),
    "della": Method("della", _SUM, (*_OWN, "epsilon"), _della, moves=True),
    "della_linear": Method("della_linear", _SUM, (*_OWN, "epsilon"), _della_linear, moves=True),
    "sce": Method("sce", ("int8_mask", "select_topk"), (), _sce, moves=True),
    "model_stock": Method("model_stock", ("filter_wise",), (), _stock, moves=True),
    "nearswap": Method("nearswap", ("t",), (), _nearswap, base_first=True, inputs=2),
    "ram": Method("ram", ("epsilon",), (), _ram, moves=True),
    "passthrough": Method("average", (), ("scale",), _passthrough, inputs=1),
}
REFUSED = {
    "ramplus_tl": "RAM+ multiplies what only one expert moved by a factor for each tensor, which no technique here does; take ram",
    "arcee_fusion": "its importance (a softmax over rows of weights) has no technique here; take sce or ties",
}
PARAMETERS = sorted({name for method in METHODS.values() for name in method.knows} | {"r", "alpha"})
"""Every parameter of mergekit's methods."""
