"""The sections of a study file and the valid values of each key.

Invariant: a section that exists is valid by itself, whatever the rest of the study says. Defaults are defined here and
in the recipe, nowhere else. Only names that are one plain path segment become part of a path.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from merge_service.checkpoints import bytes_of
from pipeline.files.paths import expanded
from pipeline.identity import fingerprint
from pipeline.study.addresses import refuse_secret
from pipeline.study.places import Folder, Place
from workers.data.encoded.addresses import plain
from workers.jobs import Reading
from workers.learning.wanted import COMMON, METHODS
from workers.models.configuration import Preprocess
from workers.training.recipe import Mixture

_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def segment(value: str) -> str:
    """`value` if it is one path segment: letters, digits, '.', '_', '-', beginning with a letter or digit. Raises ValueError."""
    if not _SEGMENT.fullmatch(value):
        raise ValueError(
            f"{value[:60]!r} is not a plain name; use letters, digits, '.', '_' and '-', beginning with a letter or digit"
        )
    return value


def _distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is listed twice; remove one")
    return values


def _some(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("is an empty list; name at least one, or leave the key out")
    return values


def size_of(value: Any) -> int | None:
    """A size such as 500MB or 2 GB (decimal), or a number of bytes; None is no limit."""
    found = None if value is None else bytes_of(str(value))
    if found is not None and not 50_000_000 <= found <= 10**15:
        raise ValueError(f"{value!r} must be from 50MB to 1000TB")
    return found


def _written_out(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(expanded, values))


def _suite(value: str) -> str:
    return expanded(value) if value.endswith(SUITE_ENDINGS) else segment(value)


SUITE_ENDINGS = (".yaml", ".yml")


def _one_or_several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Name = Annotated[str, AfterValidator(segment)]
Names = Annotated[tuple[Name, ...], AfterValidator(_distinct)]
SomeNames = Annotated[Names, AfterValidator(_some)]
Words = Annotated[tuple[str, ...], BeforeValidator(_one_or_several), AfterValidator(_some)]
Text = Annotated[str, Field(min_length=1, max_length=4096)]


class Section(BaseModel):
    """A frozen model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def key_of(section: Section) -> str:
    """A digest that is equal for sections with equal values, whatever the order of their keys."""
    return fingerprint(section.model_dump(mode="json"))


class ModelSection(Section):
    """The base: any open_clip architecture with a tag, a directory or file, `local-dir:` or `hf-hub:`; null is random
    with `seed`.

    `preprocess` states how pixels become the model's input; each key replaces that of its configuration (see
    `workers.models.base`).
    """

    config: Place
    pretrained: Place | None = None
    preprocess: Preprocess | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = Field(default=0, ge=0, lt=2**31)


class GroupsSection(Section):
    """The held-out sets in two groups (see `workers.data.zero_shot`)."""

    replayed: Names = ()
    never_replayed: Names = ()


class DataSection(Section):
    """A root of WebDataset folders and the datasets of each role. A suite defines the roles, and may define the groups.

    `suite` is the name of a suite under data/ (`suite.json`), or a YAML file that describes the datasets under `root`.
    `reading`: pictures are decoded once into the cache, or read as they are stored; auto goes by the number of samples of a split.
    `addresses`: servers and buckets from which shards may be read, where a manifest says that they are there.
    """

    suite: Annotated[str, AfterValidator(_suite)] | None = None
    root: Folder | None = None
    pretraining: Names | None = None
    adaptation: SomeNames | None = None
    held_out: Names | None = None
    zero_shot_groups: GroupsSection | None = None
    cache: Place | None = None
    reading: Reading = "decoded"
    addresses: tuple[Annotated[str, AfterValidator(plain)], ...] | None = None

    @model_validator(mode="after")
    def _located(self) -> Self:
        if self.suite is None and self.root is None:
            raise ValueError("give suite (for instance mini) or root, the folder that holds the datasets")
        if self.described and self.root is None:
            raise ValueError(
                f"suite {self.suite} only describes datasets; give root, the folder that holds them"
            )
        return self

    @property
    def described(self) -> bool:
        """Whether `suite` is a file that describes the datasets."""
        return self.suite is not None and self.suite.endswith(SUITE_ENDINGS)


BUDGETS = ("total_gflops", "steps_per_task", "samples_per_task")


class BudgetSection(Section):
    """How long experts train. `total_gflops` is for the whole stream, memory-adjusted; the other two are per task."""

    total_gflops: float | None = Field(default=None, gt=0, le=1e30)
    steps_per_task: int | None = Field(default=None, gt=0, le=10**9)
    samples_per_task: int | None = Field(default=None, gt=0, le=10**12)
    multiplier: float = Field(default=1.0, gt=0, le=1e6)

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"{' and '.join(given)} are given" if given else "nothing is given"
            raise ValueError(f"{what}; give exactly one of {', '.join(BUDGETS)} (null takes one back)")
        return self


class StrategySection(Section):
    """One entry of `grid.strategies`; lists under init, deploy and technique mean every combination."""

    preset: str | None = None
    name: Name | None = None
    init: Words | None = None
    deploy: Words | None = None
    technique: Annotated[Words, AfterValidator(_written_out)] | None = None
    params: dict[str, Any] = {}
    ema_seed: str | None = None
    parity: str | None = None
    mixture: Mixture | None = None


class EvaluationSection(Section):
    """The whole test split of every dataset by default; the `split` val instead, or a class-balanced `fraction` drawn with `seed`.

    `details` are kept with the scores: the share of samples whose class is among the five most likely, the mean over classes, the score
    of each class, and which classes were taken for which. `precision` is that of the towers.
    """

    split: Literal["test", "val"] = "test"
    fraction: float = Field(default=1.0, gt=0, le=1)
    batch_size: int = Field(default=256, ge=1, le=1_000_000)
    seed: int = Field(default=0, ge=0, lt=2**31)
    details: tuple[Literal["top5", "mean_per_class", "per_class", "confusion"], ...] = ()
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A study without details, in fp32, is written, and tracked, as it was before there were others."""
        values: dict[str, Any] = handler(self)
        unused = {
            *(() if self.details else ("details",)),
            *(("precision",) if self.precision == "fp32" else ()),
        }
        return {key: value for key, value in values.items() if key not in unused}

    def precision_on(self, device: str) -> Literal["fp32", "bf16", "fp16"]:
        """What the towers compute in on a device; auto is fp16 on a GPU and fp32 on a CPU."""
        if self.precision == "auto":
            return "fp32" if device == "cpu" else "fp16"
        return self.precision


class _Sparse(Section):
    """A section of which only what is not the default is written, so that a study without it reads as before there was such a section."""

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        return {key: value for key, value in values.items() if value != type(self).model_fields[key].default}


class StatisticsSection(_Sparse):
    """How experts are measured for techniques that see data, on rows of their own task's training split.

    `examples` null is the kind's own number (256; 128 for gradients), drawn with `seed`. `labels`: of which classes gradients are taken
    (`sample`, of one drawn from the model's own answer; `expectation`, of all; `given`, of the true one). `towers`: `both` passes them
    through both towers, `image` against class embeddings of the base. No key bears on a technique that measures nothing.
    """

    examples: int | None = Field(default=None, ge=1, le=1_000_000)
    seed: int = Field(default=0, ge=0, lt=2**31)
    labels: Literal["sample", "expectation", "given"] = "sample"
    towers: Literal["both", "image"] = "both"
    precision: Literal["fp32", "bf16"] = "fp32"


class LearningSection(_Sparse):
    """How the coefficients of learned merges are learned, on training splits; null is the method's own default (`docs/learned.md`).

    `warm_start`: experts that were merged at the time step before begin with their coefficients of then. `safe`: concrete masks are
    learned against triggers, too. `start` of concrete is the technique's `scale`. No key bears on a technique that learns nothing.
    """

    steps: int | None = Field(default=None, ge=0, lt=2**31)
    learning_rate: float | None = Field(default=None, gt=0)
    batch_size: int | None = Field(default=None, ge=1, le=1_000_000)
    examples: int | None = Field(default=None, ge=1, le=1_000_000)
    seed: int = Field(default=0, ge=0, lt=2**31)
    start: float | None = None
    towers: Literal["image", "both"] = "image"
    granularity: Literal["tensor", "model"] | None = None
    clamp: bool | None = None
    weigh: Literal["equal", "classes"] | None = None
    temperature: float | None = Field(default=None, gt=0)
    similarity: float | None = Field(default=None, ge=0)
    safe: bool = False
    adversarial_weight: float | None = Field(default=None, ge=0)
    trigger_rate: float | None = Field(default=None, gt=0)
    warm_start: bool = True

    def method(self, technique: str) -> str:
        """The way to learn what a technique merges with."""
        return "concrete_safe" if self.safe and technique == "concrete" else technique

    def given(self, technique: str) -> dict[str, Any]:
        """The stated values that bear on it. What the technique itself has is none of them."""
        row = METHODS[self.method(technique)]
        own = ("start", "temperature") if row.technique == "concrete" else ()
        known = {*COMMON, *row.takes}.difference(own)
        return {key: value for key, value in self if value is not None and key in known}


class MaxRunning(Section):
    """The most steps of each kind that run at a time; null is as many as fit."""

    train: int | None = Field(default=None, ge=1, le=1_000_000)
    measure: int | None = Field(default=None, ge=1, le=1_000_000)
    learn: int | None = Field(default=None, ge=1, le=1_000_000)
    merge: int | None = Field(default=None, ge=1, le=1_000_000)
    evaluate: int | None = Field(default=None, ge=1, le=1_000_000)

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A study without a limit for measuring and learning is written as it was before there were any."""
        values: dict[str, Any] = handler(self)
        return {
            key: value
            for key, value in values.items()
            if key not in ("measure", "learn") or value is not None
        }


class ScheduleSection(Section):
    """The priority of steps: the longest chain of work first, or trajectories in the order written. Results do not
    depend on it.
    """

    priority: Literal["critical_path", "trajectories"] = "critical_path"
    max_running: MaxRunning = MaxRunning()


class StorageSection(Section):
    """Where artifacts are kept, and which merges keep their weights.

    `store` null is OUT/store, else a directory or an fsspec URL, which studies may share. `keep` says which merged weights stay as
    files: all, the last of every trajectory (final), that of the best trajectory (best), or none; the others are recipes, made again
    when they are wanted, and `cache` bytes of those made so stay for the next time. With final and best, one in `anchors` folds
    stays too, so that later ones are made from it (0: none).
    """

    store: Place | None = None
    keep: Literal["all", "final", "best", "none"] = "all"
    cache: Annotated[int, BeforeValidator(size_of)] = 20 * 10**9
    anchors: int = Field(default=8, ge=0, le=1_000_000)

    @model_validator(mode="after")
    def _place(self) -> Self:
        if self.store is None or "://" not in self.store:
            return self
        if self.keep != "all" and not self.store.startswith(("file://", "local://")):
            raise ValueError(
                f"keep: {self.keep} needs a store in a directory; artifacts at {self.store.partition('://')[0]}:// are all kept: "
                "leave keep out, or give a directory that all machines share"
            )
        instead = "give credentials in the environment (for s3:// AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), and the plain URL here"
        refuse_secret("store", self.store, instead, queries=False)
        return self
