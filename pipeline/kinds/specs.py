"""Specs: everything that determines a step's result, one class per kind. A spec names contents by their digests, never by paths.

Invariant: `to_json` gives the dictionary that plans and records hold, whose fingerprint is the step's; `of(to_json())`
is equal. Lists that several steps share stay one object, so that the size of a plan is that of the new parts of its
steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, NotRequired, Protocol, Self, TypedDict

BASE = "base"


class SourceSpec(TypedDict):
    """One split of one dataset. `digest` is of its content, `prompts` of class names and templates, `classes` of the
    classes whose samples are read (None for all). `reading` is there where training cuts pictures out of the originals.
    """

    dataset: str
    split: str
    digest: str
    prompts: str
    classes: str | None
    reading: NotRequired[Literal["encoded"]]


class Spec(Protocol):
    """The methods of every spec."""

    kind: ClassVar[str]

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Self:
        """The spec in a dictionary of a plan or a record."""

    def to_json(self) -> dict[str, Any]:
        """The dictionary whose fingerprint is the step's."""

    def inputs(self) -> dict[str, str]:
        """Fingerprints of the artifacts that the step reads, by role."""


class _Fields:
    """A spec whose JSON is its fields."""

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Self:
        return cls(**spec)

    def to_json(self) -> dict[str, Any]:
        return _values(self)


@dataclass(frozen=True)
class BaseSpec(_Fields):
    """The base model: the digests of its weights and of its configuration."""

    kind: ClassVar[str] = BASE
    version: int
    weights: str
    config: str

    def inputs(self) -> dict[str, str]:
        return {}


@dataclass(frozen=True)
class TrainSpec:
    """One expert, trained from the weights `init` on `update` data, with replay of `buffer` and `pretraining` data.

    `training` holds what the network determines of its training; other networks do not have it (`ModelFacts.training`).
    """

    kind: ClassVar[str] = "train"
    version: int
    init: str
    update: Sequence[SourceSpec]
    buffer: Sequence[SourceSpec]
    pretraining: Sequence[SourceSpec]
    recipe: Mapping[str, Any]
    steps: int
    seed: int
    engine: Mapping[str, Any]
    training: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Self:
        names = {one.name for one in fields(cls)} - {"training"}
        named = {key: value for key, value in spec.items() if key in names}
        return cls(**named, training={key: value for key, value in spec.items() if key not in names})

    def to_json(self) -> dict[str, Any]:
        values = _values(self)
        training = values.pop("training")
        return {**values, **training}

    def inputs(self) -> dict[str, str]:
        return {"init": self.init}


@dataclass(frozen=True)
class MergeSpec:
    """One merge of `members` (id, fingerprint), oldest first, on a base, in a form, by a technique with resolved parameters.

    `source` is the digest of the file that defines a user's own technique, None for techniques of the catalogue.
    """

    kind: ClassVar[str] = "merge"
    version: int
    technique: str
    params: Mapping[str, Any]
    form: str
    base: str
    members: Sequence[tuple[str, str]]
    source: str | None = None

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Self:
        named = {key: value for key, value in spec.items() if key != "inputs"}
        return cls(**named, members=[(name, fingerprint) for name, fingerprint in spec["inputs"]])

    def to_json(self) -> dict[str, Any]:
        values = _values(self)
        values["inputs"] = [[name, fingerprint] for name, fingerprint in values.pop("members")]
        source = values.pop("source")
        return values if source is None else {**values, "source": source}

    def inputs(self) -> dict[str, str]:
        return {BASE: self.base, **dict(self.members)}


@dataclass(frozen=True)
class EvaluateSpec:
    """The scores of one model on one split of several datasets, of `fraction` of their samples drawn with `seed`.

    `details` are what is kept besides, `precision` is that of the towers; a spec without any, in fp32, is what it was before there were
    others.
    """

    kind: ClassVar[str] = "evaluate"
    version: int
    model: str
    datasets: Sequence[SourceSpec]
    fraction: float
    seed: int
    device: Literal["cpu", "cuda"]
    details: Sequence[str] = ()
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Self:
        return cls(**spec)

    def to_json(self) -> dict[str, Any]:
        values = _values(self)
        details, precision = values.pop("details"), values.pop("precision")
        values |= {"details": list(details)} if details else {}
        return values | ({"precision": precision} if precision != "fp32" else {})

    def inputs(self) -> dict[str, str]:
        return {"model": self.model}


@dataclass(frozen=True)
class ExpertSpec(_Fields):
    """An expert that came from outside: the sha256 of its weights, and the base whose tensors and configuration it has."""

    kind: ClassVar[str] = "expert"
    version: int
    weights: str
    base: str

    def inputs(self) -> dict[str, str]:
        return {BASE: self.base}


@dataclass(frozen=True)
class SequenceSpec(_Fields):
    """What a live service deploys after its accepted experts, which `chain` stands for: base, strategy, and the sha256 of each in order.

    A chain is as long for a thousand experts as for one, so that the thousandth costs no more. `policy` is that of the merge, as in
    `timelines.Merged`.
    """

    kind: ClassVar[str] = "sequence"
    version: int
    base: str
    chain: str
    policy: str
    newest: str

    def inputs(self) -> dict[str, str]:
        return {BASE: self.base, "newest": self.newest}


def _values(spec: Any) -> dict[str, Any]:
    """The fields of a spec by name, not copied: `asdict` would copy lists that steps share."""
    return {one.name: getattr(spec, one.name) for one in fields(spec)}
