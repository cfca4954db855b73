"""What bears on a step's result, one class per kind of step: a spec names contents by their digests, never places.

Invariant: `to_json` gives the dictionary that plans and records hold, whose fingerprint is the step's; `of(to_json())` is equal. Lists
that several steps share stay one object, so that a plan is as small as what is new in each of its steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Protocol, Self, TypedDict

BASE = "base"


class SourceSpec(TypedDict):
    """One split of one dataset: `digest` is that of its content, `prompts` that of class names and templates, `classes` that of the
    classes whose samples are read, None for all."""

    dataset: str
    split: str
    digest: str
    prompts: str
    classes: str | None


class Spec(Protocol):
    """What every kind's spec can say."""

    kind: ClassVar[str]

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Self:
        """The spec that a plan or a record holds as a dictionary."""

    def to_json(self) -> dict[str, Any]:
        """The dictionary whose fingerprint is the step's."""

    def inputs(self) -> dict[str, str]:
        """Fingerprints of the artifacts that the step reads, by role."""


@dataclass(frozen=True)
class BaseSpec:
    """The base model: the digests of its weights and of its configuration."""

    kind: ClassVar[str] = BASE
    version: int
    weights: str
    config: str

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Self:
        return cls(**spec)

    def to_json(self) -> dict[str, Any]:
        return _values(self)

    def inputs(self) -> dict[str, str]:
        return {}


@dataclass(frozen=True)
class TrainSpec:
    """One expert: from the weights `init`, on `update` data beside a replayed `buffer` and `pretraining` data.

    `training` is what the network decides of its training and other networks do not have (`ModelFacts.training`).
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
    """One merge: a technique with every parameter resolved, in a form, of `members` (id, fingerprint), oldest first, on a base.

    `source` is the digest of the file that a technique of one's own is written in, None for those of the catalogue.
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
    """The scores of one model on one split of several datasets, of `fraction` of their samples drawn with `seed`."""

    kind: ClassVar[str] = "evaluate"
    version: int
    model: str
    datasets: Sequence[SourceSpec]
    fraction: float
    seed: int
    device: Literal["cpu", "cuda"]

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Self:
        return cls(**spec)

    def to_json(self) -> dict[str, Any]:
        return _values(self)

    def inputs(self) -> dict[str, str]:
        return {"model": self.model}


def _values(spec: Any) -> dict[str, Any]:
    """The fields of a spec by name, as they are: `asdict` would copy lists that steps share."""
    return {one.name: getattr(spec, one.name) for one in fields(spec)}
