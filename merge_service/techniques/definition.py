"""What a merging technique is, as data, and the register of all there are.

A technique is a choice of parts (what the rule sees, how it is thinned out, how experts are combined, how the result is
scaled) plus parameters. The tables are in `catalogue.py`; `rules.py` turns the parts into arithmetic; nothing here imports
numpy, so configuration files can be checked at once.

Invariant: `resolve` gives every effective parameter of one form and nothing else. Two merges that compute the same
have the same resolved parameters, whatever was written in the configuration.

Parameter names have one meaning everywhere: `weight` of the NEW expert in a fold (SLERP too), `density` the fraction
KEPT, `scale` lambda.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from merge_service.errors import TechniqueError
from merge_service.techniques.params import Param, nearest
from merge_service.techniques.rule import Combining
from merge_service.techniques.thinning import KeepAll

Form = Literal["merge", "fold", "stream"]

_MERGE = frozenset({"merge"})

WEIGHT = Param("weight", "float", 0.5, "weight of the new expert; the running model gets 1 - weight", 0, 1)
SCALE = Param("scale", "float", 1.0, "lambda, the factor of the merged task vector")
DENSITY = Param("density", "float", 0.2, "fraction of every task vector that is kept", 0, 1, above_low=True)
GRANULARITY = Param(
    "granularity",
    "choice",
    "tower",
    "over what a threshold or a majority sign is taken; image and text tower separately by default",
    choices=("model", "tower", "tensor"),
)
CONSENSUS = Param(
    "consensus",
    "choice",
    "mean",
    "how the kept values that agree with the elected sign are combined",
    choices=("mean", "sum", "max"),
)
COUNT_FROZEN = Param(
    "count_frozen",
    "bool",
    True,
    "whether tensors that an expert left equal to the base count when the kept fraction is measured",
)
LOGIT_SCALE = Param(
    "logit_scale",
    "choice",
    "merge",
    "merge: as any parameter, then at most ln(100) as CLIP has it; base: keep the base's; unclamped: as any parameter (TIME)",
    choices=("merge", "base", "unclamped"),
)
OUTLIERS = Param("outliers", "float", 0.01, "fraction of largest magnitudes dropped", 0, 1)
SEED = Param("seed", "int", 0, "seed of the random masks", 0, 2**63 - 1)
LINES = (
    Param("lines_alpha", "float", 0.5, "factor of the first block and of everything outside blocks"),
    Param("lines_beta", "float", 0.5, "what the factor grows by from the first block to the last"),
    Param(
        "lines_shape",
        "choice",
        "linear",
        "growth over depth x in [0, 1]: x, x squared, or the square root of x",
        choices=("linear", "quadratic", "sqrt"),
    ),
)
SCHEDULES = ("uniform", "linear", "sqrt", "quadratic", "cubic", "exp", "log")
AVERAGING = (
    WEIGHT,
    Param("weights", "floats", None, "one weight per expert, normalised; excludes schedule", 0, forms=_MERGE),
    Param("schedule", "choice", "uniform", "weights that grow with time", choices=SCHEDULES, forms=_MERGE),
)


@dataclass(frozen=True)
class Origin:
    """Where a technique that is not ours is written: its module, and the sha256 of the file (`own.py`)."""

    module: str
    source: str


@dataclass(frozen=True)
class Technique:
    """What a technique is. `combine` makes the rule by which experts come together, `thin` how task vectors are thinned out, both of
    its parameters.

    `factor` names the parameter that multiplies the combined task vector (LiNeS has `depth` instead); `adds` says that task
    vectors are summed, not averaged.
    `ordered`: every expert is seen against those before it, so all at once is the stream from the first on.
    `origin` is where a technique is written that somebody else wrote.
    """

    name: str
    formula: str
    paper: str
    params: tuple[Param, ...]
    combine: Callable[[Mapping[str, Any]], Combining]
    space: Literal["weights", "task_vectors"] = "task_vectors"
    thin: type[KeepAll] = KeepAll
    depth: bool = False
    factor: str = "scale"
    adds: bool = False
    forms: frozenset[str] = frozenset({"merge", "fold", "stream"})
    arity: int | None = None
    ordered: bool = False
    exceptions: Mapping[str, str] = field(default_factory=dict, hash=False)
    origin: Origin | None = None

    @property
    def needs(self) -> frozenset[str]:
        """What it needs besides experts: {"base"} or nothing."""
        return frozenset({"base"}) if self.space == "task_vectors" else frozenset()

    def moves(self, params: Mapping[str, Any]) -> bool:
        """Whether task vectors are merged (else weights), which some techniques leave to the parameter `space`."""
        return params.get("space", self.space) == "task_vectors"

    def param(self, name: str) -> Param:
        """The parameter called `name`; raises `TechniqueError` naming the nearest one."""
        for param in self.params:
            if param.name == name:
                return param
        known = [param.name for param in self.params]
        raise TechniqueError(
            f"{self.name} has no parameter {name!r}{nearest(str(name), known)}; it has {', '.join(known)}"
        )

    def require(self, form: Form) -> None:
        """Raise `TechniqueError` when the technique does not exist in `form`."""
        if form not in self.forms:
            raise TechniqueError(
                f"{self.name} has no {form} form, only {' and '.join(sorted(self.forms))}; "
                + ("merge all experts at once instead" if form == "stream" else "choose another technique")
            )

    def resolve(self, params: Mapping[str, Any], form: Form, *, strict: bool = False) -> dict[str, Any]:
        """Every effective parameter of `form` ("merge" also serves "stream"), in the table's order.

        Parameters of the other form are checked and left out, so one configuration can speak to both; with `strict` they
        are an error. Raises `TechniqueError` on an unknown name, a value out of range, or a contradiction.
        """
        self.require(form)
        speaks = "merge" if form == "stream" else form
        given = {name: self.param(name).validate(value, self.name) for name, value in params.items()}
        if strict:
            self._refuse_idle(given, speaks)
        resolved = {p.name: given.get(p.name, p.default) for p in self.params if speaks in p.forms}
        if resolved.get("density", 0) + resolved.get("outliers", 0) > 1 + 1e-12:
            raise TechniqueError(
                f"{self.name}: density {resolved['density']} + outliers {resolved['outliers']} is more than everything; "
                "lower one of them"
            )
        if resolved.get("weights") is not None and resolved.get("schedule") != "uniform":
            raise TechniqueError(f"{self.name}: give weights or a schedule, not both")
        self._refuse_chances(resolved)
        return resolved

    def _refuse_chances(self, resolved: Mapping[str, Any]) -> None:
        density, epsilon = resolved.get("density", 1), resolved.get("epsilon", 0)
        if density < 1 and epsilon and not epsilon < density <= 1 - epsilon + 1e-12:
            raise TechniqueError(
                f"{self.name}: chances from density - epsilon = {density - epsilon:g} to density + epsilon = "
                f"{density + epsilon:g} must lie above 0 and go up to 1 at most; lower epsilon"
            )

    def _refuse_idle(self, given: Mapping[str, Any], form: str) -> None:
        idle = [name for name in given if form not in self.param(name).forms]
        if idle:
            used = [p.name for p in self.params if form in p.forms]
            raise TechniqueError(
                f"{self.name}: {idle[0]} has no effect when the form is {form}; its parameters are {', '.join(used)}"
            )

    def warnings(self, params: Mapping[str, Any], init: str, deploy: str) -> list[str]:
        """What grows without bound when the technique is used with these axes of TIME.

        Under EMA initialization an expert already holds the running model, so a fold that adds task vectors multiplies
        the past by 2*scale at every task (and one that averages them by scale); with init: all it is 1 + scale.
        """
        if self.space != "task_vectors" or "ema" not in (init, deploy, "ema" if init == "all" else ""):
            return []
        resolved = self.resolve(params, "fold" if "ema" in (init, deploy) else "merge")
        factor, word = self._largest_factor(resolved)
        adds = self.adds or resolved.get("consensus") == "sum"
        found = []
        if init == "ema":
            growth = 2 * factor if adds else factor
            found += _growth(
                self.name, growth, f"{'2*' if adds else ''}{word}", "init: ema", 0.5 if adds else 1
            )
        elif init == "all" and adds:
            found += _growth(self.name, 1 + factor, f"1 + {word}", "init: all", None)
        if init != "ema" and deploy == "ema":
            found += _growth(self.name, factor, word, "deploy: ema", 1)
        return found

    def _largest_factor(self, resolved: Mapping[str, Any]) -> tuple[float, str]:
        if not self.depth:
            return abs(resolved[self.factor]), self.factor
        alpha, beta = resolved["lines_alpha"], resolved["lines_beta"]
        return max(abs(alpha), abs(alpha + beta)), "(lines_alpha + lines_beta)"


def _growth(name: str, growth: float, formula: str, where: str, safe: float | None) -> list[str]:
    if growth <= 1:
        return []
    bounded = (
        "a technique that averages keeps it bounded"
        if safe is None
        else f"{formula.removeprefix('2*')} <= {safe:g} keeps it bounded"
    )
    return [
        f"{name} with {where} multiplies what was learned before by {formula} = {growth:g} at every task ({growth**10:.3g} times after 10 tasks, "
        f"{growth**20:.3g} times after 20), without bound; {bounded}, or choose it on a validation split for as many tasks as will come"
    ]
