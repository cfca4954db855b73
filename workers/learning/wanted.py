"""What is to be learned: a method with its parameters, checked before any file is opened.

A method is a row: which technique merges with the result, which loss it has, and the defaults of its parameters. Invariant: a
parameter that has no effect on a method is refused.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from merge_service.errors import UserError
from merge_service.techniques import nearest

Kind = Literal["entropy", "labels", "experts", "heads", "triggers"]
COMMON = (
    "start",
    "steps",
    "learning_rate",
    "batch_size",
    "towers",
    "examples",
    "seed",
    "device",
    "adapted_on",
)


@dataclass(frozen=True)
class Method:
    """One way to learn. `technique` merges with the result. `takes` are its parameters besides `COMMON`; `defaults` are those of them
    that differ from `Wanted`'s. `each`: task number i is that of expert number i.
    """

    technique: str
    loss: Kind
    takes: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    each: bool = False


METHODS: Mapping[str, Method] = {
    "adamerging": Method(
        "adamerging",
        "entropy",
        ("granularity", "clamp", "trim", "density", "weigh", "frozen", "fold"),
        {"clamp": True},
    ),
    "supermerge": Method("supermerge", "labels", ("granularity", "weigh", "frozen")),
    "dam": Method(
        "dam", "experts", ("temperature", "similarity"), {"temperature": 2.0, "start": None}, each=True
    ),
    "concrete": Method("concrete", "entropy", ("temperature", "weigh"), {"steps": 2000}),
    "concrete_safe": Method(
        "concrete",
        "triggers",
        ("temperature", "weigh", "adversarial_weight", "trigger_rate"),
        {"steps": 2000},
    ),
    "tinting": Method(
        "tinting", "heads", ("granularity",), {"learning_rate": 1e-2, "batch_size": 32}, each=True
    ),
}


@dataclass(frozen=True)
class Wanted:
    """A method and its parameters. `start`: the coefficient that learning begins with, or one per expert (dam: None is the mean).
    `granularity`: one coefficient per expert and tensor, or per expert. `frozen`: so many experts, the first, keep theirs.
    `weigh`: classes divides a task's loss by log of its classes. `fold`: the two experts are the running
    model, which starts at 1, and the new one. `examples`: of each task so many images are drawn at most.
    """

    method: str
    start: float | tuple[float, ...] | None = 0.3
    steps: int = 500
    learning_rate: float = 1e-3
    batch_size: int = 16
    towers: Literal["image", "both"] = "image"
    examples: int = 2048
    seed: int = 0
    device: str = "cpu"
    adapted_on: Literal["training", "test"] = "training"
    granularity: Literal["tensor", "model"] = "tensor"
    clamp: bool = False
    trim: bool = False
    density: float = 0.2
    weigh: Literal["equal", "classes"] = "equal"
    frozen: int = 0
    fold: bool = False
    temperature: float = 0.5
    similarity: float = 0.01
    adversarial_weight: float = 0.1
    trigger_rate: float = 1e-4

    @classmethod
    def of(cls, method: str, params: Mapping[str, Any]) -> "Wanted":
        """Raises UserError for an unknown method or parameter, one without effect, or a value out of range."""
        if method not in METHODS:
            raise UserError(
                f"there is no way to learn {method!r}{nearest(str(method), METHODS)}; choose of {', '.join(METHODS)}"
            )
        row = METHODS[method]
        known = (*COMMON, *row.takes)
        for name in params:
            if name not in known:
                raise UserError(
                    f"{method} has no parameter {name!r}{nearest(str(name), known)}; it has {', '.join(known)}"
                )
        given = {**row.defaults, **params}
        if isinstance(given.get("start"), list | tuple):
            given["start"] = tuple(map(float, given["start"]))
        wanted = cls(method, **given)
        wanted._check()
        return wanted

    def _check(self) -> None:
        for name, allowed in _CHOICES.items():
            self._require(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        for name, (low, high) in _WHOLE.items():
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            self._require(name, whole and low <= value <= high, f"a whole number from {low} on")
        for name in _POSITIVE:
            value = getattr(self, name)
            self._require(name, _is_number(value) and value > 0, "a number above 0")
        for name in ("similarity", "adversarial_weight"):
            value = getattr(self, name)
            self._require(name, _is_number(value) and value >= 0, "a number from 0 on")
        for name in ("clamp", "trim", "fold"):
            self._require(name, isinstance(getattr(self, name), bool), "true or false")
        self._require("density", self.density <= 1, "a fraction, at most 1")
        starts = self.start if isinstance(self.start, tuple) else (self.start,)
        fits = all(_is_number(one) for one in starts) or (self.start is None and self.method == "dam")
        self._require("start", fits, "a number, or one per expert")
        if self.row.loss == "heads":
            self._require("towers", self.towers == "image", "image: a head of each task stands for its texts")
        if self.row.technique == "concrete" or self.fold:
            self._require("start", not isinstance(self.start, tuple), "one number")
        if self.row.loss == "labels":
            self._require(
                "start",
                all(abs(float(one)) < 1 for one in starts if one is not None),
                "between -1 and 1, as tanh gives them",
            )
            self._require(
                "adapted_on",
                self.adapted_on == "training",
                "training: it learns from labels, which a test split must not give",
            )

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise UserError(f"{self.method}: {name} = {getattr(self, name)!r} is not {what}")

    @property
    def row(self) -> Method:
        """The method."""
        return METHODS[self.method]

    def starts(self, experts: int) -> list[float]:
        """The first coefficient of every expert. Raises UserError for another number of them."""
        if self.start is None:
            return [1 / experts] * experts
        found = list(self.start) if isinstance(self.start, tuple) else [self.start] * experts
        if len(found) != experts:
            raise UserError(
                f"{self.method}: start has {len(found)} entries for {experts} experts; give one each"
            )
        return found

    def unlearned(self, experts: int) -> list[float]:
        """The factor of every expert in tensors without coefficients, as the merge gives it: the mean (dam), or the first one."""
        return [1 / experts] * experts if self.row.technique == "dam" else self.starts(experts)

    def said(self) -> dict[str, Any]:
        """The parameters that have an effect, as plain values."""
        names = [one.name for one in fields(self) if one.name in (*COMMON, *self.row.takes)]
        return {
            name: list(value) if isinstance(value := getattr(self, name), tuple) else value for name in names
        }

    def of_merge(self) -> dict[str, Any]:
        """The parameters of the merge that follows, and `start`, which tensors without coefficients keep, in the unit of the file."""
        start: Any = list(self.start) if isinstance(self.start, tuple) else self.start
        if self.row.loss == "labels":  # the file holds w of tanh(w)
            start = [math.atanh(one) for one in start] if isinstance(start, list) else math.atanh(start)
        found: dict[str, Any] = {"start": start}
        if self.adapted_on != "training":
            found["adapted_on"] = self.adapted_on
        if self.method == "adamerging":
            found |= {"trim": self.trim, **({"density": self.density} if self.trim else {})}
        if self.row.technique == "concrete":
            found |= {"scale": self.start, "temperature": self.temperature}
        return found


_CHOICES = {
    "towers": ("image", "both"),
    "adapted_on": ("training", "test"),
    "granularity": ("tensor", "model"),
    "weigh": ("equal", "classes"),
}
_WHOLE = {
    "steps": (0, 2**31),
    "batch_size": (1, 2**31),
    "examples": (1, 2**31),
    "seed": (0, 2**63 - 1),
    "frozen": (0, 2**31),
}
_POSITIVE = ("learning_rate", "temperature", "density", "trigger_rate")


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and value == value
        and abs(value) < 1e30
    )
