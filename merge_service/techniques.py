"""The catalogue of merging techniques: one literal table, no tensors.

A technique is a choice of parts (what the rule sees, how it is thinned out, how experts are combined, how the result is
scaled) plus parameters. `rules.py` turns the parts into arithmetic; nothing here imports numpy, so configuration files
can be checked at once.

Invariant: `resolve` gives every effective parameter of one form and nothing else. Two merges that compute the same
have the same resolved parameters, whatever was written in the configuration.

Parameter names have one meaning everywhere: `weight` of the NEW expert in a fold (SLERP too), `density` the fraction
KEPT, `scale` lambda.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from merge_service.errors import TechniqueError
from merge_service.params import Param, nearest

Form = Literal["merge", "fold", "stream"]

_MERGE = frozenset({"merge"})
_FOLD = frozenset({"fold"})

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
    "merge: as any parameter, then at most ln(100) as CLIP has it; base: keep the base's",
    choices=("merge", "base"),
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
class Technique:
    """What a technique is. See the fields of the table below for the words used in `space`, `sparsify`, `combine`, `depth`.

    `ordered`: every expert is seen against those before it, so all at once is the stream from the first on.
    """

    name: str
    formula: str
    paper: str
    params: tuple[Param, ...]
    combine: str
    space: Literal["weights", "task_vectors"] = "task_vectors"
    sparsify: Literal["none", "magnitude", "random", "band"] = "none"
    depth: bool = False
    forms: frozenset[str] = frozenset({"merge", "fold", "stream"})
    arity: int | None = None
    ordered: bool = False
    exceptions: Mapping[str, str] = field(default_factory=dict, hash=False)

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
        return resolved

    def _refuse_idle(self, given: Mapping[str, Any], form: str) -> None:
        idle = [name for name in given if form not in self.param(name).forms]
        if idle:
            used = [p.name for p in self.params if form in p.forms]
            raise TechniqueError(
                f"{self.name}: {idle[0]} has no effect when the form is {form}; its parameters are {', '.join(used)}"
            )

    def warnings(self, params: Mapping[str, Any], init: str, deploy: str) -> list[str]:
        """What is known to end badly when the technique is used with these axes of TIME.

        Under EMA initialization an expert already holds the running model, so a fold that adds task vectors multiplies
        the past by 2*scale at every task (and one that averages them by scale); with init: all it is 1 + scale.
        """
        if self.space != "task_vectors" or "ema" not in (init, deploy, "ema" if init == "all" else ""):
            return []
        resolved = self.resolve(params, "fold" if "ema" in (init, deploy) else "merge")
        factor, word = self._largest_factor(resolved)
        adds = self.combine == "sum" or resolved.get("consensus") == "sum"
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
            return abs(resolved["scale"]), "scale"
        alpha, beta = resolved["lines_alpha"], resolved["lines_beta"]
        return max(abs(alpha), abs(alpha + beta)), "(lines_alpha + lines_beta)"


def _growth(name: str, growth: float, formula: str, where: str, safe: float | None) -> list[str]:
    if growth <= 1:
        return []
    remedy = (
        "use a technique that averages" if safe is None else f"keep {formula.removeprefix('2*')} <= {safe:g}"
    )
    return [
        f"{name} with {where} multiplies what was learned before by {formula} = {growth:g} at every task "
        f"({growth**10:.3g} times after 10 tasks): it will diverge; {remedy}"
    ]


_TIES_PAPER = "TIES-Merging, arXiv 2306.01708"
_DARE_PAPER = "DARE, arXiv 2311.03099; with TIES election as in TIME, arXiv 2412.06712"
_CRUMBS_PAPER = "Model Breadcrumbs, arXiv 2312.06795; with TIES election as in TIME, arXiv 2412.06712"
_LINES_PAPER = "LiNeS, arXiv 2410.17146, on top of "
_ELECT = "θ = θ0 + scale · {how}{{τ̂_i : sign(τ̂_i) = sign(Σ_j τ̂_j)}}"
_NOT_IDENTITY = {"P2": "copies of one expert give its thinned-out task vector, not the expert"}
_SUMS = {"P2": "copies of one expert add up unless scale * N = 1", "P10": "a sum leaves the convex hull"}

_TRIM = (DENSITY, CONSENSUS, GRANULARITY, COUNT_FROZEN)
_DROP = (DENSITY, SEED, CONSENSUS, GRANULARITY)
_BAND = (DENSITY, OUTLIERS, CONSENSUS, GRANULARITY, COUNT_FROZEN)

_PLAIN = (
    Technique(
        "average",
        "θ = Σ w_i θ_i / Σ w_i;  fold: θ = (1 - weight) · running + weight · new",
        "Model soups, arXiv 2203.05482; weights that grow with time as in TIME, arXiv 2412.06712",
        (*AVERAGING[1:], Param(**{**vars(WEIGHT), "forms": _FOLD}), LOGIT_SCALE),
        combine="mean",
        space="weights",
    ),
    Technique(
        "slerp",
        "θ = [sin((1-w)Ω) running + sin(wΩ) new] / sin Ω per tensor, cos Ω = <running, new> / (|running| |new|)",
        "Shoemake 1985; as in MergeKit, arXiv 2403.13257, with w on the new model",
        (WEIGHT, LOGIT_SCALE),
        combine="slerp",
        space="weights",
        forms=frozenset({"merge", "fold"}),
        arity=2,
        exceptions={
            "P3": "the second checkpoint is the new one",
            "P4": "takes exactly two",
            "P5": "takes exactly two",
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
        (Param(**{**vars(SCALE), "default": 0.3}), LOGIT_SCALE),
        combine="sum",
        exceptions=_SUMS,
    ),
    Technique(
        "ties",
        "τ̂_i = τ_i where |τ_i| is in the top density, else 0;  " + _ELECT.format(how="mean"),
        _TIES_PAPER,
        (*_TRIM, SCALE, LOGIT_SCALE),
        combine="disjoint",
        sparsify="magnitude",
        exceptions=_NOT_IDENTITY,
    ),
    Technique(
        "dare_ties",
        "τ̂_i = τ_i / density with probability density, else 0;  " + _ELECT.format(how="mean"),
        _DARE_PAPER,
        (*_DROP, SCALE, LOGIT_SCALE),
        combine="disjoint",
        sparsify="random",
        exceptions=_NOT_IDENTITY | {"P10": "kept values are divided by density"},
    ),
    Technique(
        "breadcrumbs_ties",
        "τ̂_i = τ_i without its smallest (1 - density - outliers) and largest (outliers) magnitudes;  "
        + _ELECT.format(how="mean"),
        _CRUMBS_PAPER,
        (*_BAND, SCALE, LOGIT_SCALE),
        combine="disjoint",
        sparsify="band",
        exceptions=_NOT_IDENTITY,
    ),
    Technique(
        "magmax",
        "θ = θ0 + scale · τ_i*, i* = argmax_i |τ_i| per element; of equal magnitudes the later expert wins",
        "MagMax, arXiv 2407.06322",
        (SCALE, LOGIT_SCALE),
        combine="largest",
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
        sparsify=technique.sparsify,
        depth=True,
        exceptions={**technique.exceptions, "P2": "every layer is scaled by its depth"},
    )


_LINED = ("task_arithmetic", "ties", "dare_ties", "breadcrumbs_ties")
_TABLE: dict[str, Technique] = {
    t.name: t for t in (*_PLAIN, *(_with_lines(t) for t in _PLAIN if t.name in _LINED))
}


def _join(table: Iterable[Technique]) -> None:
    _TABLE.update((technique.name, technique) for technique in table)


ALIASES = {"lines": "lines_task_arithmetic"}


def names() -> tuple[str, ...]:
    """The canonical names, in the order a person should read about them."""
    return tuple(_TABLE)


def get(name: str) -> Technique:
    """The technique called `name` (or an alias of it); raises `TechniqueError` naming the nearest one."""
    technique = _TABLE.get(ALIASES.get(str(name), str(name)))
    if technique is None:
        known = (*names(), *ALIASES)
        raise TechniqueError(
            f"unknown technique {name!r}{nearest(str(name), known)}; there are {', '.join(known)}"
        )
    return technique


from merge_service.catalogue_tensors import TENSORWISE  # noqa: E402  (it is made of the class above)

_join(TENSORWISE)
