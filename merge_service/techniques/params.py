"""Parameters of techniques as data: allowed values, their validation in one place, and the parameters that families share.

A name has one meaning everywhere: `weight` of the NEW expert in a fold (SLERP too), `density` the fraction KEPT, `scale` lambda.

Invariant: a validated value is a plain JSON value in one canonical form (1 and 1.0 give the same), so equal merges have equal
parameters and equal hashes.
"""

import difflib
import sys
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, Literal

from merge_service.errors import TechniqueError

BOTH = frozenset({"merge", "fold"})
Kind = Literal["float", "int", "bool", "choice", "floats", "table"]


@dataclass(frozen=True)
class Param:
    """One parameter: its default, range, meaning, and the forms it applies to.

    `low` and `high` bound numbers inclusively, unless `above_low` excludes the lower end. A `floats` parameter is a list of
    numbers or None, a `table` a list of numbers by pattern of tensor names, or None. A `quiet` one is left out of the parameters of a merge where it has its default, so that merges without it are named
    as before it existed. One with `each` may be a list with an entry for every expert; `alone` says why one that others have for every
    expert is one number here. A table whose numbers are at least 0 has weights of a mean, of which not all may be zero.
    """

    name: str
    kind: Kind
    default: Any
    doc: str
    low: float | None = None
    high: float | None = None
    above_low: bool = False
    choices: tuple[str, ...] = ()
    forms: frozenset[str] = BOTH
    quiet: bool = False
    each: bool = False
    alone: str = ""

    @property
    def range(self) -> str:
        """The allowed values as text."""
        if self.kind == "choice":
            return " | ".join(self.choices)
        if self.kind == "bool":
            return "true | false"
        if self.low is None and self.high is None:
            return "any number"
        left = "" if self.low is None else f"{self.low:g} {'<' if self.above_low else '<='} "
        right = "" if self.high is None else f" <= {self.high:g}"
        return f"{left}{'each' if self.kind == 'floats' else 'x'}{right}"

    def validate(self, value: Any, owner: str) -> Any:
        """The canonical form of `value`; raises `TechniqueError` naming the technique, the parameter and the range."""
        if self.kind == "floats":
            return self._list(value, owner)
        if self.kind == "table":
            return self._table(value, owner)
        if self.kind == "choice":
            return self._choice(value, owner)
        if self.each and isinstance(value, list | tuple) and value:
            return [self._number(one, owner) for one in value]
        if self.kind == "bool":
            if not isinstance(value, bool):
                raise self._wrong(value, owner)
            return value
        return self._number(value, owner)

    def _number(self, value: Any, owner: str) -> float | int:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise self._wrong(value, owner)
        value = int(value) if isinstance(value, Integral) else float(value)
        too_low = self.low is not None and (value < self.low or (self.above_low and value == self.low))
        too_high = abs(value) > sys.float_info.max or (self.high is not None and value > self.high)
        if too_low or too_high or value != value or (self.kind == "int" and value != int(value)):
            raise self._wrong(value, owner)
        return int(value) if self.kind == "int" else float(value) + 0.0

    def _choice(self, value: Any, owner: str) -> str:
        if not isinstance(value, str) or value not in self.choices:
            raise self._wrong(value, owner, nearest(str(value), self.choices))
        return str(value)

    def _list(self, value: Any, owner: str) -> list[float] | None:
        if value is None:
            return None
        entries = _entries(value)
        if entries is None:
            raise self._wrong(value, owner)
        numbers = [float(self._number(item, owner)) for item in entries]
        if not any(numbers):
            raise TechniqueError(f"{owner}: {self.name} = {value!r} has no weight above zero")
        return numbers

    def _table(self, value: Any, owner: str) -> dict[str, list[float]] | None:
        if value is None:
            return None
        if not isinstance(value, Mapping) or not value:
            raise self._wrong(value, owner)
        found: dict[str, list[float]] = {}
        for key in sorted(value, key=str):
            entries = _entries(value[key])
            if entries is None:
                raise self._wrong({str(key): value[key]}, owner)
            found[str(key)] = [float(self._number(item, owner)) for item in entries]
        nothing = [key for key, one in found.items() if self.low is not None and not any(one)]
        if nothing:
            raise TechniqueError(f"{owner}: {self.name} of {nothing[0]!r} has no weight above zero")
        return found

    def _wrong(self, value: Any, owner: str, hint: str = "") -> TechniqueError:
        what = {
            "float": "a number",
            "int": "a whole number",
            "floats": "a list of numbers",
            "table": "a list of numbers by pattern",
        }.get(self.kind, "one")
        why = (
            f"; it is one for all experts, because {self.alone}"
            if self.alone and isinstance(value, list | tuple)
            else ""
        )
        return TechniqueError(f"{owner}: {self.name} = {value!r} is not {what} of: {self.range}{hint}{why}")


def _entries(value: Any) -> list[Any] | None:
    """The entries of a list, a tuple or an array with an axis; None for what has no order, no entries or is text."""
    if isinstance(value, str | bytes | Mapping | Set) or not isinstance(value, Iterable):
        return None
    try:
        return list(value)
    except TypeError:  # an array without an axis
        return None


def listed(value: Any) -> list[Any]:
    """The values of a parameter that may be a list, one per expert."""
    return list(value) if isinstance(value, list | tuple) else [value]


def of_expert(value: Any, order: int) -> Any:
    """The value of expert number `order` (from 1) of such a parameter."""
    return value[order - 1] if isinstance(value, list | tuple) else value


def nearest(word: str, among: Iterable[str]) -> str:
    """'; did you mean X?' or nothing."""
    found = difflib.get_close_matches(word.lower().replace("-", "_"), list(among), n=1)
    return f"; did you mean {found[0]}?" if found else ""


WEIGHT = Param("weight", "float", 0.5, "weight of the new expert; the running model gets 1 - weight", 0, 1)
SCALE = Param("scale", "float", 1.0, "lambda, the factor of the merged task vector")
SUM_SCALE = replace(SCALE, default=0.3)
SEED = Param("seed", "int", 0, "seed of the random masks", 0, 2**63 - 1)
LOGIT_SCALE = Param(
    "logit_scale",
    "choice",
    "merge",
    "merge: as any parameter, then at most ln(100) as CLIP has it; base: keep the base's; unclamped: as any parameter (TIME)",
    choices=("merge", "base", "unclamped"),
)
SCHEDULES = ("uniform", "linear", "sqrt", "quadratic", "cubic", "exp", "log")
_MERGE = frozenset({"merge"})
_OF_PATTERNS = (
    "{pattern: [one per expert]}; of patterns that fit (* and ?) the name itself, else the longest, counts"
)
_TABLE = Param(
    "coefficients",
    "table",
    None,
    f"weights by tensor, normalised in each: {_OF_PATTERNS}. Excludes weights",
    0,
    forms=_MERGE,
    quiet=True,
)
_WEIGHTS = Param(
    "weights", "floats", None, "one weight per expert, normalised; excludes schedule", 0, forms=_MERGE
)
AVERAGING = (
    _WEIGHTS,
    Param("schedule", "choice", "uniform", "weights that grow with time", choices=SCHEDULES, forms=_MERGE),
    _TABLE,
    replace(WEIGHT, forms=frozenset({"fold"})),
)
SHARING = (replace(_WEIGHTS, doc="one weight per expert, normalised", quiet=True), _TABLE)
COEFFICIENTS = Param(
    "weights",
    "floats",
    None,
    "one factor per expert of its task vector, not normalised; a mean of agreeing values has the same weights",
    forms=_MERGE,
    quiet=True,
)
COEFFICIENT_TABLE = Param(
    "coefficients",
    "table",
    None,
    f"factors of task vectors by tensor: {_OF_PATTERNS}. Excludes weights",
    forms=_MERGE,
    quiet=True,
)
WEIGHING = (COEFFICIENTS, COEFFICIENT_TABLE)
CONSENSUS = Param(
    "consensus",
    "choice",
    "mean",
    "how the kept values that agree with the elected sign are combined",
    choices=("mean", "sum", "max"),
)
DENSITY = Param(
    "density",
    "float",
    0.2,
    "fraction of every task vector that is kept; one per expert where it is a list",
    0,
    1,
    above_low=True,
    each=True,
)
HALF = replace(DENSITY, default=0.5)
OUTLIERS = Param("outliers", "float", 0.01, "fraction of largest magnitudes dropped", 0, 1)
GRANULARITY = Param(
    "granularity",
    "choice",
    "tower",
    "over what a threshold or a majority sign is taken; image and text tower separately by default",
    choices=("model", "tower", "tensor"),
)
COUNT_FROZEN = Param(
    "count_frozen",
    "bool",
    True,
    "whether tensors that an expert left equal to the base count when the kept fraction is measured",
)
EPSILON = Param(
    "epsilon",
    "float",
    0.15,
    "keep probabilities go from density - epsilon (smallest magnitude of a row) to density + epsilon (largest)",
    0,
    0.5,
)
RESCALE = Param(
    "rescale",
    "choice",
    "expectation",
    "how what is kept makes up for what is dropped. expectation: divided by the probability of being kept (the papers, "
    "MergeLM, FusionBench, TIME, DELLA's own code); l1: every tensor gets its L1 norm back (MergeKit)",
    choices=("expectation", "l1"),
)
ATTENTION = Param(
    "attention",
    "choice",
    "split",
    "q, k and v packed in one tensor (and gate and up): split into the matrices they are, which the published numbers used, or "
    "whole",
    choices=("split", "whole"),
)
