"""Specs: everything that determines a step's result, one class per kind. A spec names contents by their digests, never by paths.

Invariant: `to_json` gives the dictionary that plans and records hold, whose fingerprint is the step's; `of(to_json())`
is equal. Lists that several steps share stay one object, so that the size of a plan is that of the new parts of its
steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, NotRequired, Protocol, Self, TypedDict

from workers.jobs import COEFFICIENTS_FILE

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

    `source` is the digest of the file that defines a user's own technique, None for techniques of the catalogue. `statistics` are
    (id, fingerprint of the measurement, or of what was learned for all) of every member, where the technique needs one.
    """

    kind: ClassVar[str] = "merge"
    version: int
    technique: str
    params: Mapping[str, Any]
    form: str
    base: str
    members: Sequence[tuple[str, str]]
    source: str | None = None
    statistics: Sequence[tuple[str, str]] = ()

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Self:
        named = {key: value for key, value in spec.items() if key not in ("inputs", "statistics")}
        members, statistics = (
            [(name, found) for name, found in spec.get(key, ())] for key in ("inputs", "statistics")
        )
        return cls(**named, members=members, statistics=statistics)

    def to_json(self) -> dict[str, Any]:
        values = _values(self)
        values["inputs"] = [[name, fingerprint] for name, fingerprint in values.pop("members")]
        source, statistics = values.pop("source"), values.pop("statistics")
        values |= {} if source is None else {"source": source}
        return values | ({"statistics": [[*pair] for pair in statistics]} if statistics else {})

    def inputs(self) -> dict[str, str]:
        measured = {f"statistics of {name}": fingerprint for name, fingerprint in self.statistics}
        return {BASE: self.base, **dict(self.members), **measured}


@dataclass(frozen=True)
class MeasureSpec(_Fields):
    """A statistic of `models`, each on its own `data` (splits of a task), which technique-independent `params` and a seed determine.

    All kinds are of one model, except those of all experts together, which also depend on how these are merged (`merging`). `examples`
    rows are drawn of each model's data. `head` is the base whose class embeddings stand for the text tower, "" where none does.
    `engine` are the kind of device and the threads.
    """

    kind: ClassVar[str] = "measure"
    version: int
    statistic: str
    models: Sequence[str]
    data: Sequence[Sequence[SourceSpec]]
    examples: int
    seed: int
    params: Mapping[str, Any]
    merging: Mapping[str, Any]
    head: str
    engine: Mapping[str, Any]

    def inputs(self) -> dict[str, str]:
        models = {f"model {number}": model for number, model in enumerate(self.models, start=1)}
        return {**models, **({"head": self.head} if self.head else {})}

    def file_of(self, model: str) -> str:
        """The file of the artifact that has the statistic of a model; the only one where a base stands for an expert."""
        return f"{1 + (self.models.index(model) if model in self.models else 0)}.safetensors"


@dataclass(frozen=True)
class LearnSpec(_Fields):
    """The coefficients with which `models`, oldest first, are merged on a base, learned by a method from `data`, the splits of each task.

    `params` are the method's without the device. `before` is the learn step from whose coefficients models that it has begin, "" where
    none does. `engine` are the kind of device and the threads.
    """

    kind: ClassVar[str] = "learn"
    version: int
    method: str
    params: Mapping[str, Any]
    base: str
    models: Sequence[str]
    data: Sequence[Sequence[SourceSpec]]
    before: str
    engine: Mapping[str, Any]

    def inputs(self) -> dict[str, str]:
        models = {f"model {number}": model for number, model in enumerate(self.models, start=1)}
        return {BASE: self.base, **models, **({"before": self.before} if self.before else {})}

    def file_of(self, model: str) -> str:
        """The file of the artifact that a merge reads for a model: the one for all of them."""
        return COEFFICIENTS_FILE


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
