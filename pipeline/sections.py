"""The sections of a study file and what each key may be.

Invariant: a section that exists is valid by itself, whatever the rest of the study says; the defaults are here and in the
recipe, nowhere else. Only names that are one plain path segment get as far as a path.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, Optional, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from merge_service.shards import bytes_of
from pipeline.addresses import refuse_secret
from pipeline.fingerprint import fingerprint
from pipeline.places import Place, expanded
from workers.configuration import Preprocess
from workers.jobs import EngineSpec
from workers.recipe import Mixture

_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def segment(value: str) -> str:
    """A name that is one path segment: letters, digits, '.', '_', '-', not beginning with a sign. Raises ValueError."""
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


def _bytes(value: Any) -> int | None:
    """A size such as 500MB or 2 GB (decimal), or a number of bytes; None is no limit."""
    found = None if value is None else bytes_of(str(value))
    if found is not None and not 50_000_000 <= found <= 10**15:
        raise ValueError(f"{value!r} must be from 50MB to 1000TB")
    return found


Memory = Annotated[int | None, BeforeValidator(_bytes)]
Seconds = Annotated[float, Field(gt=0, le=30 * 24 * 3600)]


def _auto_or_count(value: Any) -> Any:
    if value == "auto" or (type(value) is int and 1 <= value <= 10_000):
        return value
    raise ValueError(f"{value!r} must be auto or a whole number from 1 to 10000")


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
    """Frozen, and deaf to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def key_of(section: Section) -> str:
    """What tells a section from others with other values, whatever order its keys were written in."""
    return fingerprint(section.model_dump(mode="json"))


class ModelSection(Section):
    """The base: any open_clip architecture with a tag, a directory or file, `local-dir:` or `hf-hub:`; null is random with `seed`.

    `preprocess` states how pixels become its input, key by key instead of what its configuration says (see `workers.base`).
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
    """A root of WebDataset folders and which datasets play which role. A suite brings its own roles, and may bring the groups.

    `suite` is the name of a suite that lies under data/ (`suite.json`), or a YAML file that describes one under `root`.
    """

    suite: Annotated[str, AfterValidator(_suite)] | None = None
    root: Place | None = None
    pretraining: Names | None = None
    adaptation: SomeNames | None = None
    held_out: Names | None = None
    zero_shot_groups: GroupsSection | None = None
    cache: Place | None = None

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
        """Whether `suite` is a file that describes one."""
        return self.suite is not None and self.suite.endswith(SUITE_ENDINGS)


BUDGETS = ("total_gflops", "steps_per_task", "samples_per_task")


class BudgetSection(Section):
    """How long experts train. `total_gflops` is for the whole stream, memory-adjusted; the others are for each task."""

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
    """One entry of `grid.strategies`; lists under init, deploy and technique stand for every combination."""

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
    """The whole test split of every dataset by default; the `split` val instead, or a class-balanced `fraction` drawn with `seed`."""

    split: Literal["test", "val"] = "test"
    fraction: float = Field(default=1.0, gt=0, le=1)
    batch_size: int = Field(default=256, ge=1, le=1_000_000)
    seed: int = Field(default=0, ge=0, lt=2**31)


class ExpertResources(Section):
    """What one expert gets: `workers` processes with `gpus`, `cpus` and `threads` each. `groups` experts train at a time.

    `checkpoint_every` is in steps (0: never). `timeout` is in seconds without a sign of progress, then the step is tried again.
    `memory` is what each worker may have, mapped weights aside; evaluations keep to it as well. Workers, ZeRO stage, engine and
    threads bear on the bits of the result; the others do not.
    """

    gpus: float = Field(default=0, ge=0, le=64)
    cpus: float = Field(default=1, ge=0, le=1024)
    workers: int = Field(default=1, ge=1, le=4096)
    zero_stage: int = Field(default=0, ge=0, le=3)
    engine: Literal["auto", "torch", "deepspeed"] = "auto"
    threads: int = Field(default=1, ge=1, le=1024)
    checkpoint_every: int = Field(default=50, ge=0)
    groups: Annotated[Any, BeforeValidator(_auto_or_count)] = "auto"
    max_retries: int = Field(default=3, ge=0, le=1000)
    timeout: Seconds = 3600
    memory: Memory = None

    @model_validator(mode="after")
    def _engine_can(self) -> Self:
        if self.engine == "torch" and (self.workers > 1 or self.zero_stage > 0):
            raise ValueError(
                f"engine torch trains with one worker and no ZeRO, not workers {self.workers} and zero_stage "
                f"{self.zero_stage}; use engine deepspeed or auto"
            )
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus {self.gpus:g} is neither a share of one GPU nor a whole number of them")
        return self

    @property
    def numerics(self) -> EngineSpec:
        """The engine that these resources mean: plain torch for a single CPU worker, DeepSpeed otherwise."""
        plain = self.workers == 1 and self.zero_stage == 0 and self.gpus == 0
        kind: Literal["torch", "deepspeed"] = "torch" if plain else "deepspeed"
        if self.engine != "auto":
            kind = self.engine
        return EngineSpec(
            kind, self.zero_stage, self.threads, "cuda" if self.gpus > 0 else "cpu", self.workers
        )


class EvaluationResources(Section):
    """What one evaluation gets; null is what one of the expert's workers has. `actors` score at the same time, auto is as many as fit.

    Where the shape is that of experts with one worker, the same processes train and score. 0 CPUs and 0 GPUs take no place
    of their own: one such evaluator then runs beside the experts. `timeout` is how many seconds one may take.
    """

    gpus: float | None = Field(default=None, ge=0, le=64)
    cpus: float | None = Field(default=None, ge=0, le=1024)
    actors: Annotated[Any, BeforeValidator(_auto_or_count)] = "auto"
    threads: int | None = Field(default=None, ge=1, le=1024)
    timeout: Seconds = 3600


class MergingResources(Section):
    """`threads` of a merge, `actors` that merge at the same time, without a CPU of their own; no result depends on them.

    `timeout`: seconds a merge may take; `memory`: an actor's, mapped weights aside; `any_base`: merge experts far from the base.
    """

    threads: int = Field(default=1, ge=1, le=1024)
    actors: int = Field(default=1, ge=1, le=1024)
    timeout: Seconds = 3600
    memory: Memory = None
    any_base: bool = False


def _overrides(section: type[Section]) -> Any:
    """The section with every key optional; null is what is said for all models."""
    fields: dict[str, Any] = {
        name: (Optional[field.annotation], None)  # noqa: UP045 - an annotation that is known at run time only
        for name, field in section.model_fields.items()
    }
    return create_model(f"{section.__name__}Overrides", __base__=Section, **fields)


ExpertOverrides, EvaluationOverrides = _overrides(ExpertResources), _overrides(EvaluationResources)


class ModelOverrides(Section):
    """What one model of the study gets instead."""

    experts: ExpertOverrides = ExpertOverrides()  # type: ignore[valid-type]
    evaluation: EvaluationOverrides = EvaluationOverrides()  # type: ignore[valid-type]


@dataclass(frozen=True)
class ModelResources:
    """What experts and evaluations of one model get, nothing left open but what is "auto"."""

    experts: ExpertResources
    evaluation: EvaluationResources

    @property
    def evaluation_device(self) -> Literal["cpu", "cuda"]:
        """Where scores are computed; part of their identity."""
        return "cuda" if self.evaluation.gpus else "cpu"


class ResourcesSection(Section):
    """Where and how wide things run. `by_model` holds what differs for the model of that `model.config`.

    `autoscaling`: nodes may join later, so nothing is too large to ask for, and `groups` must be a number. `start_timeout` is
    how many seconds a worker may take to start (import torch, meet the other ranks) before its first step."""

    experts: ExpertResources = ExpertResources()
    evaluation: EvaluationResources = EvaluationResources()
    merging: MergingResources = MergingResources()
    by_model: dict[str, ModelOverrides] = {}
    autoscaling: bool = False
    start_timeout: Seconds = 600

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for name in (None, *self.by_model):
            try:
                found = self._merged(name)
            except ValidationError as error:
                texts = "; ".join(
                    f"{'.'.join(map(str, one['loc']))} {one['msg'].removeprefix('Value error, ')}".strip()
                    for one in error.errors()
                )
                raise ValueError(f"by_model.{name}: {texts}") from None
            if self.autoscaling and found.experts.groups == "auto":
                where = f"by_model.{name}.experts.groups" if name else "experts.groups"
                raise ValueError(
                    f"autoscaling needs {where} as a number: how many experts may train at a time"
                )
        return self

    @cached_property
    def resolved(self) -> dict[str | None, ModelResources]:
        """What each model named in `by_model` gets, and under None every other."""
        return {name: self._merged(name) for name in (None, *self.by_model)}

    def of(self, model: str) -> ModelResources:
        """What experts and evaluations of a model (its `model.config`) get."""
        return self.resolved.get(model) or self.resolved[None]

    def _merged(self, model: str | None) -> ModelResources:
        experts, evaluation = self.experts.model_dump(), self.evaluation.model_dump()
        if model in self.by_model:
            mine = self.by_model[model].model_dump(exclude_none=True)
            experts |= mine["experts"]
            evaluation |= mine["evaluation"]
        for key in ("gpus", "cpus", "threads"):
            if evaluation[key] is None:
                evaluation[key] = experts[key]
        return ModelResources(ExpertResources(**experts), EvaluationResources(**evaluation))


class MaxRunning(Section):
    """At most so many steps of a kind at the same time; null is as many as there is place for."""

    train: int | None = Field(default=None, ge=1, le=1_000_000)
    merge: int | None = Field(default=None, ge=1, le=1_000_000)
    evaluate: int | None = Field(default=None, ge=1, le=1_000_000)


class ScheduleSection(Section):
    """What goes first: the longest chain of work, or one trajectory after the other in the order written. No result depends on it."""

    priority: Literal["critical_path", "trajectories"] = "critical_path"
    max_running: MaxRunning = MaxRunning()


class StorageSection(Section):
    """Where artifacts are kept: `store` null is OUT/store, else a directory or an fsspec URL, which studies may share."""

    store: Place | None = None

    @model_validator(mode="after")
    def _place(self) -> Self:
        if self.store is None or "://" not in self.store:
            return self
        instead = "give credentials in the environment (for s3:// AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), and the plain URL here"
        refuse_secret("store", self.store, instead, queries=False)
        return self
