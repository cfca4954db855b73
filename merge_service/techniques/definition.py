"""A technique as data: a choice of parts and parameters.

The parts are objects made of the parameters: how task vectors are thinned out (`thinning.py`), the rule that combines experts
(`rule.py`, `families/`), and how the result is scaled (`scaling.py`). No module here imports numpy, so studies are checked
quickly.

Invariant: `resolve` gives every effective parameter of one form and nothing else. Two merges that compute the same have the same
resolved parameters, whatever was written in the configuration.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from merge_service.errors import TechniqueError
from merge_service.techniques.params import Param, listed, nearest
from merge_service.techniques.rule import Combining
from merge_service.techniques.scaling import BY_SCALE, Factor
from merge_service.techniques.thinning import KeepAll

Form = Literal["merge", "fold", "stream"]


@dataclass(frozen=True)
class Origin:
    """Where a technique that is not built in is defined: its module, and the sha256 of the file (`own.py`).

    `file` is the path from which this process loaded the module. It is a place and not part of the identity.
    """

    module: str
    source: str
    file: str = field(default="", compare=False)


@dataclass(frozen=True)
class Evidence:
    """A measurement that a technique needs of every expert (`of` the expert's weights, or of the base on the expert's data; of
    all experts together, for one merge). `learned`: it is a file of coefficients of all experts together.

    `when` is a parameter and the value at which it is needed; always without it. `labels`: the data must have them.
    """

    kind: str
    of: Literal["expert", "base", "experts", "learned"] = "expert"
    labels: bool = False
    when: tuple[str, str] | None = None

    def needed(self, params: Mapping[str, Any]) -> bool:
        """Whether it is needed with these parameters."""
        return self.when is None or params.get(self.when[0]) == self.when[1]


@dataclass(frozen=True)
class Technique:
    """One technique. `rule` makes the rule that combines experts, and `thin` the object that thins out task vectors, both from
    the parameters; `scale` is the factor of the combined task vector.

    `forms` are the forms it exists in. A technique with an `arity` takes exactly that many checkpoints. `ordered`: every expert
    is combined with those before it, so a merge of all is the stream from the first on. `breaks` declares which of the laws for
    all techniques (P1 to P16, tests/merge_service/techniques/test_properties.py) do not hold for this one, and why. `origin` is
    where a technique that is not built in is defined. `portable`: equal inputs give equal bits on every machine; false where
    singular vectors come from a linear algebra library. `evidence` is what must be measured first. `resumes`: a fold continues the
    state of the running model, which its weights alone do not give. `keeps` says what the state holds, where that is more than its arrays.
    `unweighed` says why experts have no weights, where they have none.
    """

    name: str
    formula: str
    paper: str
    params: tuple[Param, ...]
    rule: Callable[[Mapping[str, Any]], Combining]
    space: Literal["weights", "task_vectors"] = "task_vectors"
    thin: type[KeepAll] = KeepAll
    scale: Factor = BY_SCALE
    forms: frozenset[str] = frozenset({"merge", "fold", "stream"})
    arity: int | None = None
    ordered: bool = False
    breaks: Mapping[str, str] = field(default_factory=dict, hash=False)
    aliases: tuple[str, ...] = ()
    origin: Origin | None = None
    portable: bool = True
    evidence: tuple[Evidence, ...] = ()
    resumes: bool = False
    keeps: str = ""
    unweighed: str = ""

    @property
    def needs(self) -> frozenset[str]:
        """What the technique needs besides experts: {"base"} or nothing."""
        return frozenset({"base"}) if self.space == "task_vectors" else frozenset()

    @property
    def learned(self) -> bool:
        """Whether it merges with coefficients that must be learned first, for these experts."""
        return any(one.of == "learned" for one in self.evidence)

    def asked(self, params: Mapping[str, Any]) -> Evidence | None:
        """The measurement that is needed with these parameters."""
        return next((one for one in self.evidence if one.needed(params)), None)

    def moves(self, params: Mapping[str, Any]) -> bool:
        """Whether task vectors are merged (else weights); some techniques have the parameter `space` for this."""
        return params.get("space", self.space) == "task_vectors"

    def param(self, name: str) -> Param:
        """The parameter called `name`; raises `TechniqueError` naming the nearest one."""
        for param in self.params:
            if param.name == name:
                return param
        known = [param.name for param in self.params]
        if self.unweighed and name in ("weights", "coefficients"):
            raise TechniqueError(f"{self.name} has no {name} of experts: {self.unweighed}; leave {name} out")
        raise TechniqueError(
            f"{self.name} has no parameter {name!r}{nearest(str(name), known)}; it has {', '.join(known)}"
        )

    def require(self, form: Form) -> None:
        """Raise `TechniqueError` if the technique does not exist in `form`."""
        if form not in self.forms:
            raise TechniqueError(
                f"{self.name} has no {form} form, only {' and '.join(sorted(self.forms))}; "
                + ("merge all experts at once instead" if form == "stream" else "choose another technique")
            )

    def resolve(self, params: Mapping[str, Any], form: Form, *, strict: bool = False) -> dict[str, Any]:
        """Every effective parameter of `form` ("merge" also serves "stream"), in the table's order.

        Parameters of the other form are checked and left out, so that one configuration can serve both; with `strict` they are an
        error. Raises `TechniqueError` on an unknown name, a value out of range, or a contradiction.
        """
        self.require(form)
        speaks = "merge" if form == "stream" else form
        given = {name: self.param(name).validate(value, self.name) for name, value in params.items()}
        if strict:
            self._refuse_idle(given, speaks)
        resolved = {
            p.name: given.get(p.name, p.default)
            for p in self.params
            if speaks in p.forms and not (p.quiet and given.get(p.name) == p.default)
        }
        if max(listed(resolved.get("density", 0))) + resolved.get("outliers", 0) > 1 + 1e-12:
            raise TechniqueError(
                f"{self.name}: density {resolved['density']} + outliers {resolved['outliers']} is more than everything; "
                "lower one of them"
            )
        weighing = [
            name
            for name in ("weights", "coefficients", "schedule")
            if resolved.get(name) not in (None, "uniform")
        ]
        if len(weighing) > 1:
            raise TechniqueError(f"{self.name}: give {' or '.join(weighing)}, not both")
        self._refuse_chances(resolved)
        rule = self.rule(resolved)
        if form == "stream" and not (rule.streams and resolved.get("coefficients") is None):
            raise TechniqueError(
                f"{self.name} with these parameters needs every expert at the end and has no stream form; merge all at once"
            )
        return resolved

    def _refuse_chances(self, resolved: Mapping[str, Any]) -> None:
        epsilon = resolved.get("epsilon", 0)
        for density in listed(resolved.get("density", 1)):
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
        """Warnings about growth without bound when the technique is used with these axes of TIME.

        Under EMA initialization an expert already holds the running model, so a fold that adds task vectors multiplies the past
        by 2*scale at every task (and one that averages them by scale); with init: all it is 1 + scale. Nothing is known of learned factors.
        """
        if (
            self.learned
            or self.space != "task_vectors"
            or "ema" not in (init, deploy, "ema" if init == "all" else "")
        ):
            return []
        resolved = self.resolve(params, "fold" if "ema" in (init, deploy) else "merge")
        factor, word = self.scale.largest(resolved)
        adds = self.rule(resolved).adds
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
