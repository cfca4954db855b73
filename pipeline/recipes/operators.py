"""How a tensor is made, from the parameters of a recipe: the operator, and the experts that take part.

Weights of experts become what the technique has for them: the `weights` of a mean, the `weight` of an interpolation of two, or a
factor of a sum if all are equal; else its `weights`. An expert of weight zero does not take part in a sum of task vectors.

Invariant: whatever a technique has no parameter for is refused by name; nothing that a recipe says is left out.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from json import dumps, loads
from typing import Any

from merge_service.errors import TechniqueError
from merge_service.merging import Operator
from merge_service.techniques import Technique, get
from pipeline.recipes.model import PER_EXPERT, Expert
from pipeline.recipes.settings import TABLES, When, chained, is_uniform, value_at

Choice = tuple[Operator, tuple[int, ...]]
_SUMS = ("task_arithmetic", "breadcrumbs", "dare", "della_linear")


class Chooser:
    """Gives the `Choice` of tensors. `levels` are the parameters of a slice, a module and the merge, the most special first."""

    def __init__(
        self, technique: str, levels: Sequence[Mapping[str, Any]], experts: Sequence[Expert]
    ) -> None:
        self.technique = get(technique)
        names = dict.fromkeys(name for level in levels for name in level if name not in TABLES)
        self._tables = {name: level[name] for level in reversed(levels) for name in TABLES if name in level}
        self._shared = {name: chained(*(level.get(name) for level in levels)) for name in names}
        self._own = {
            name: [chained(getattr(one, name)) for one in experts]
            for name in PER_EXPERT
            if any(getattr(one, name) is not None for one in experts)
        }
        self._count = len(experts)
        self.is_uniform = all(
            is_uniform(level[name]) for level in levels for name in level if name in names
        ) and all(is_uniform(getattr(one, name)) for one in experts for name in (*PER_EXPERT, "factor"))

    def at(self, name: str, t: float, theirs: Sequence[str]) -> Choice:
        """The choice for a tensor called `name` in the output and `theirs` in the experts, at depth t."""
        params = {key: value_at(found, name, t) for key, found in self._shared.items()}
        own = {
            key: tuple(self._one(key, rules, there, params, t) for rules, there in zip(found, theirs))
            for key, found in self._own.items()
        }
        known = self._tables | {key: value for key, value in params.items() if value is not None}
        return _choice(
            self.technique.name, dumps(known, sort_keys=True), dumps(own, sort_keys=True), self._count
        )

    def _one(self, key: str, found: Sequence[When], name: str, params: Mapping[str, Any], t: float) -> Any:
        value = value_at(found, name, t)
        value = params.get(key) if value is None else value
        if value is None:
            raise TechniqueError(
                f"an expert has no {key}{f' for {name}' if name else ''}; give one for all names, as the last entry {{value: ...}}"
            )
        return value


@cache
def _choice(technique: str, shared: str, own: str, count: int) -> Choice:
    """The operator with these parameters as JSON, for `count` experts."""
    found = get(technique)
    params, mine = loads(shared), loads(own)
    live = tuple(range(count))
    if "weight" in mine:
        params.pop("weight", None)
        live = _weigh(found, params, mine.pop("weight"))
    for key, values in mine.items():
        params[key] = _shared(found, key, [values[at] for at in live] or values[:1])
    return Operator.of(technique, params, "merge"), live


def _weigh(technique: Technique, params: dict[str, Any], weights: Sequence[Any]) -> tuple[int, ...]:
    """Put the experts' weights into `params`; returns the experts that take part."""
    every = tuple(range(len(weights)))
    names = {param.name: param for param in technique.params}
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in weights):
        raise TechniqueError(f"{technique.name}: the weights {list(weights)} are not all numbers")
    if "schedule" in names:  # a mean: its weights are shares
        if len(set(weights)) > 1:
            params["weights"] = list(weights)
        elif not weights[0]:
            raise TechniqueError(f"{technique.name}: all weights are 0; give at least one expert a weight")
        return every
    if technique.arity == 2 and "weight" in names:
        total = sum(weights)
        if len(weights) != 2 or not total:
            raise TechniqueError(
                f"{technique.name} takes two experts whose weights do not add up to 0, not {list(weights)}"
            )
        params["weight"] = weights[1] / total
        return every
    if "consensus" not in names and technique.name not in _SUMS:
        raise TechniqueError(
            f"{technique.name} has no weights of experts; leave weight out, or choose another technique"
        )
    live = tuple(at for at in every if weights[at])
    equal = {weights[at] for at in live}
    if len(equal) > 1:
        params["weights"] = [weights[at] for at in live]
    elif live and (technique.name in _SUMS or params.get("consensus", "mean") == "sum"):
        params["scale"] = params.get("scale", technique.param("scale").default) * equal.pop()
    return live


def _shared(technique: Technique, key: str, values: Sequence[Any]) -> Any:
    """The one value of all experts, or a list where they differ and the technique has one for each. Raises `TechniqueError`."""
    technique.param(key)
    if len(set(values)) == 1:
        return values[0]
    if key != "density":
        raise TechniqueError(
            f"{technique.name} has one {key} for all experts, and these are {list(values)}; give all the same"
        )
    return list(values)
