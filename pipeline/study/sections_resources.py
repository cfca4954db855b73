"""The resources of a study: how much each kind of step gets, and how many run at a time.

Invariant: no key here bears on a result, apart from those that `ExpertResources.numerics` takes into the spec of an expert, and the kind
of device. A key that was added later is written only where it is used, so that studies without it are tracked as they were.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, Optional, Self

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    create_model,
    model_serializer,
    model_validator,
)

from pipeline.study.sections import Section, size_of
from workers.jobs import EngineSpec

Memory = Annotated[int | None, BeforeValidator(size_of)]
Seconds = Annotated[float, Field(gt=0, le=30 * 24 * 3600)]


def _auto_or_count(value: Any) -> Any:
    if value == "auto" or (type(value) is int and 1 <= value <= 10_000):
        return value
    raise ValueError(f"{value!r} must be auto or a whole number from 1 to 10000")


def seconds_of(value: str) -> float | None:
    """Of a time such as 90s, 5min or 1.5h; None for anything else."""
    found = _TIME.fullmatch(value)
    return float(found[1]) * {"s": 1, "min": 60, "h": 3600}[found[2]] if found else None


_TIME = re.compile(r"(\d{1,6}(?:\.\d{1,6})?) ?(s|min|h)")


def _pace(value: Any) -> Any:
    """Of checkpoints: auto, a number of steps, or a time."""
    steps = type(value) is int and 0 <= value <= 10**9
    time = seconds_of(value) if isinstance(value, str) else None
    if value == "auto" or steps or (time is not None and 1 <= time <= 30 * 24 * 3600):
        return value
    raise ValueError(
        f"{value!r} must be auto, a number of steps (0: never), or a time such as 90s, 5min or 1h"
    )


class ExpertResources(Section):
    """The resources of one expert: `workers` processes with `gpus`, `cpus` and `threads` each. `groups` experts train at a time.

    `checkpoint_every` is in steps (0: never) or a time such as 5min; auto is 50 steps on a CPU, 5min on a GPU. `loaders`
    threads read the pictures of a worker with a GPU. With `activation_checkpointing` the activations of a block are computed
    again for the backward pass instead of being kept: less memory, more computing, the same bits. After `timeout` seconds
    without progress, the step is tried again. `memory` is the limit of each worker, mapped weights excluded; it holds for
    evaluations as well. Workers, ZeRO stage, engine and threads affect the bits of the result; the others do not.
    """

    gpus: float = Field(default=0, ge=0, le=64)
    cpus: float = Field(default=1, ge=0, le=1024)
    workers: int = Field(default=1, ge=1, le=4096)
    zero_stage: int = Field(default=0, ge=0, le=3)
    engine: Literal["auto", "torch", "deepspeed"] = "auto"
    threads: int = Field(default=1, ge=1, le=1024)
    checkpoint_every: Annotated[Any, BeforeValidator(_pace)] = "auto"
    loaders: int = Field(default=2, ge=1, le=256)
    activation_checkpointing: bool = False
    groups: Annotated[Any, BeforeValidator(_auto_or_count)] = "auto"
    max_retries: int = Field(default=3, ge=0, le=1000)
    timeout: Seconds = 3600
    memory: Memory = None

    @model_serializer(mode="wrap")
    def _as_it_was(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if not self.activation_checkpointing:
            del values["activation_checkpointing"]
        return values

    @model_validator(mode="after")
    def _engine_can(self) -> Self:
        if self.engine == "torch" and (self.workers > 1 or self.zero_stage > 0):
            raise ValueError(
                f"engine: torch trains with one worker and no ZeRO, not with workers: {self.workers} and zero_stage: "
                f"{self.zero_stage}; use engine: deepspeed or auto"
            )
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus: {self.gpus:g} is neither a share of one GPU nor a whole number of them")
        if self.workers > 1 and 0 < self.gpus < 1:
            raise ValueError(
                f"gpus: {self.gpus:g} with workers: {self.workers} could put two of them on one card, which NCCL does not allow; give "
                "each a whole one, or train with one worker"
            )
        return self

    @property
    def checkpoint_pace(self) -> tuple[int, float]:
        """Between checkpoints: (steps, 0.0), or (0, seconds)."""
        every = self.checkpoint_every
        if every == "auto":
            every = "5min" if self.gpus else 50
        return (every, 0.0) if isinstance(every, int) else (0, seconds_of(every) or 0.0)

    @property
    def numerics(self) -> EngineSpec:
        """The engine for these resources: plain torch for a single CPU worker, DeepSpeed otherwise."""
        plain = self.workers == 1 and self.zero_stage == 0 and self.gpus == 0
        kind: Literal["torch", "deepspeed"] = "torch" if plain else "deepspeed"
        if self.engine != "auto":
            kind = self.engine
        return EngineSpec(
            kind, self.zero_stage, self.threads, "cuda" if self.gpus > 0 else "cpu", self.workers
        )


class EvaluationResources(Section):
    """The resources of one evaluation; null is the value of one worker of an expert. `actors` score at a time (auto:
    all that fit).

    If they equal those of experts with one worker, the same processes train and score. With 0 CPUs and 0 GPUs, one
    evaluator runs beside the experts and takes no resources of its own. `timeout` is the most seconds that one
    evaluation may take.
    """

    gpus: float | None = Field(default=None, ge=0, le=64)
    cpus: float | None = Field(default=None, ge=0, le=1024)
    actors: Annotated[Any, BeforeValidator(_auto_or_count)] = "auto"
    threads: int | None = Field(default=None, ge=1, le=1024)
    timeout: Seconds = 3600


class MergingResources(Section):
    """`threads` of a merge, and `actors` that merge at a time, without a CPU of their own; results do not depend on them.

    `timeout`: the most seconds of a merge; `memory`: the limit of an actor, mapped weights excluded; `any_base`: merge
    experts that are far from the base.
    """

    threads: int = Field(default=1, ge=1, le=1024)
    actors: int = Field(default=1, ge=1, le=1024)
    timeout: Seconds = 3600
    memory: Memory = None
    any_base: bool = False


def _overrides(section: type[Section]) -> Any:
    """The section with every key optional; null means the value for all models."""
    fields: dict[str, Any] = {
        name: (Optional[field.annotation], None)  # noqa: UP045 - an annotation that is known at run time only
        for name, field in section.model_fields.items()
    }
    return create_model(f"{section.__name__}Overrides", __base__=Section, **fields)


ExpertOverrides, EvaluationOverrides = _overrides(ExpertResources), _overrides(EvaluationResources)


class ModelOverrides(Section):
    """Resources that differ for one model of the study."""

    experts: ExpertOverrides = ExpertOverrides()  # type: ignore[valid-type]
    evaluation: EvaluationOverrides = EvaluationOverrides()  # type: ignore[valid-type]


@dataclass(frozen=True)
class ModelResources:
    """The resources of experts and evaluations of one model, complete except for "auto"."""

    experts: ExpertResources
    evaluation: EvaluationResources

    @property
    def evaluation_device(self) -> Literal["cpu", "cuda"]:
        """The device for scores; part of their identity."""
        return "cuda" if self.evaluation.gpus else "cpu"


class ResourcesSection(Section):
    """Resources and parallelism. `by_model` holds the differences for the model of that `model.config`.

    With `autoscaling`, nodes may join later, so no request is too large, and `groups` must be a number. `start_timeout`
    is the most seconds that a worker may take to start (import torch, meet the other ranks) before its first step.
    """

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
        """The resources of each model named in `by_model`, and under None those of every other."""
        return {name: self._merged(name) for name in (None, *self.by_model)}

    def of(self, model: str) -> ModelResources:
        """The resources of experts and evaluations of a model (its `model.config`)."""
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
