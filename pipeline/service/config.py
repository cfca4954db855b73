"""The configuration of a live service: a YAML file, read as strictly as a study.

Invariant: a `ServiceConfig` is valid by itself. An unknown key, a value out of range, or a key whose function this version lacks is a
`ConfigError` that names file and key. Model, strategy and name are for the whole life of a service; everything else may be set anew.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from merge_service.checkpoints import bytes_of
from merge_service.errors import CheckpointError, TechniqueError
from merge_service.live import Bounds, CanaryStarted, Lane, Margins, Tolerances
from merge_service.timelines import Strategy, check_served, needs_experts
from pipeline.errors import ConfigError
from pipeline.files.paths import expanded
from pipeline.service.settings import ListenSection, ServingSection
from pipeline.study.config import Study, study_from
from pipeline.study.mistakes import Problem, validate
from pipeline.study.sections import DataSection, ModelSection, Name, Names, Section, StrategySection, Text
from pipeline.study.sections_tracking import refuse_unusable
from pipeline.study.strategies import read_strategies
from pipeline.study.yaml_input import override, read, split_override


def _size(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return bytes_of(value)
    except CheckpointError as error:
        raise ValueError(str(error)) from None


_SPAN = re.compile(r"([0-9]{1,9})(s|m|h|d)")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _seconds(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    found = _SPAN.fullmatch(value)
    if found is None:
        raise ValueError(
            f"{value!r} is no time; write seconds, or a whole number with s, m, h or d, as in 90s or 2h"
        )
    return int(found[1]) * _UNITS[found[2]]


def _by(value: Any) -> Any:
    return {"by": value} if isinstance(value, str) else value


Size = Annotated[int, BeforeValidator(_size), Field(ge=1, le=10**15)]
Span = Annotated[float, BeforeValidator(_seconds), Field(ge=0, le=10**9)]
"""A time in seconds."""
Share = Annotated[float, Field(ge=0, le=1)]


class TasksSection(Section):
    """Tasks that experts may be submitted for; `open`: any adaptation set of the data as well. A task is one dataset."""

    open: bool = True
    list: Names = ()


class OrderSection(Section):
    """In which order arrivals are merged: as they were admitted, or `declared`, by the places of their tasks in tasks.list.

    In a declared order an arrival waits for the tasks before its own. With `holes: skip` it waits for `patience`, counted from when it
    came, and tasks that are missing then are passed over.
    """

    by: Literal["arrival", "declared"] = "arrival"
    holes: Literal["wait", "skip"] = "wait"
    patience: Span = 86400


class AdmissionSection(Section):
    """Who and what may come in. `licenses` empty accepts any; `foreign_init` is for experts of unknown start.
    `max_staleness` is how many experts may be accepted between a start ticket and its expert; by default 20 where they start from merges."""

    max_bytes: Size = 20 * 10**9
    licenses: tuple[Text, ...] = ()
    foreign_init: Literal["allow", "quarantine"] = "allow"
    max_staleness: Annotated[int, Field(ge=0)] | None = None
    uris: tuple[Text, ...] = ()


class SoloSection(Section):
    """The gate of the expert alone: what it must gain on its own task. `required` false lets tasks without data pass."""

    min_gain: Share = 0.02
    required: bool = True


class AccumulatedSection(Section):
    """What may be lost of the tasks so far: on average, and on any of them."""

    margin: Share = 0.02
    worst: Share = 0.10


class HeldOutSection(Section):
    """What may be lost of held-out datasets, on average."""

    margin: Share = 0.03


class GeometrySection(Section):
    """Norms of a task vector are within `low` to `high` times those of reference: the medians of accepted experts, and `reference`, by
    name, while fewer than `fewest` are accepted. A cosine above `copy` is a copy.
    """

    low: float = Field(default=0.25, gt=0, le=1)
    high: float = Field(default=4.0, ge=1)
    copy_cosine: float = Field(default=0.999, gt=0, lt=1)
    fewest: int = Field(default=5, ge=1)
    reference: dict[Text, float] = {}


class CanarySection(Section):
    """What a candidate may do on real requests: fail this share, agree with the champion on no less than `agreement` of the pictures, and
    take `slower` times as long."""

    failed: Share = 0.01
    agreement: Share = 0.5
    slower: float = Field(default=2.0, ge=1)


class GatesSection(Section):
    """The gates. `fraction` of the samples is scored, drawn with `seed`; `split` is test or val."""

    solo: SoloSection = SoloSection()
    accumulated: AccumulatedSection = AccumulatedSection()
    held_out: HeldOutSection = HeldOutSection()
    geometry: GeometrySection = GeometrySection()
    drift: Share = 0.05
    canary: CanarySection = CanarySection()
    undecided: Literal["hold", "reject", "pass"] = "hold"
    fraction: float = Field(default=1.0, gt=0, le=1)
    seed: int = Field(default=0, ge=0, lt=2**31)
    split: Literal["test", "val"] = "test"


class TrialSection(Section):
    """A candidate answers this share of real requests as well, until there are so many, or for so long."""

    share: float = Field(default=0.1, gt=0, le=1)
    requests: int = Field(default=500, ge=1, le=10**9)
    deadline: Span = 3600


class PromotionSection(Section):
    """Whether what passes all gates is served at once, or held for a person; and after a trial on real requests: as a `canary`, whose
    answers are returned, or as a `shadow`, whose answers are only compared."""

    mode: Literal["auto", "manual"] = "auto"
    canary: TrialSection | None = None
    shadow: TrialSection | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.canary and self.shadow:
            raise ValueError(
                "canary and shadow: give one of them; a canary is compared with what is served too"
            )
        return self

    def trial(self, now_ms: int) -> CanaryStarted | None:
        """The trial of a candidate that passed all gates now."""
        found = self.canary or self.shadow
        if found is None:
            return None
        deadline = now_ms + int(1000 * found.deadline)
        return CanaryStarted(found.share, found.requests, deadline, self.shadow is not None)


class LimitsSection(Section):
    """How much at a time: uploads, arrivals that wait, and arrivals of one owner a day. `reserve` bytes of the disk stay free of uploads."""

    uploads: int = Field(default=4, ge=1)
    waiting: int = Field(default=1000, ge=1)
    per_owner_per_day: int = Field(default=50, ge=1)
    reserve: Size = 10**9


class ServiceResources(Section):
    """Where and how fast; no result depends on it. `home` local is this machine; ray is a Ray cluster at `address`, where each of
    serving.workers replicas has so many `cpus`, and the work as many as it has `threads`."""

    home: Literal["local", "ray"] = "local"
    address: Text = "auto"
    cpus: float = Field(default=1.0, gt=0, le=1024)
    threads: int = Field(default=1, ge=1, le=1024)
    batch_size: int = Field(default=256, ge=1, le=1_000_000)


class RegistrySection(Section):
    """MLflow, where versions and aliases are delivered: `uri` null delivers nothing. `model` is the name of the registered model, by
    default the service's."""

    uri: Annotated[Text, AfterValidator(expanded)] | None = None
    experiment: Text = "temporal-merge"
    model: Name | None = None

    @model_validator(mode="after")
    def _usable(self) -> Self:
        refuse_unusable(self.uri)
        return self


class ServiceConfig(Section):
    """One live service: `strategy` is a preset's name or what a study has under grid.strategies, for one strategy.

    Up to `batch` arrivals are merged and judged as one candidate; if that fails, it is halved until those that fail are alone.
    """

    name: Name
    model: ModelSection
    strategy: str | StrategySection
    data: DataSection | None = None
    tasks: TasksSection = TasksSection()
    admission: AdmissionSection = AdmissionSection()
    same_task: Literal["replace", "add", "best"] = "best"
    order: Annotated[OrderSection, BeforeValidator(_by)] = OrderSection()
    batch: int = Field(default=1, ge=1, le=1024)
    gates: GatesSection = GatesSection()
    promotion: PromotionSection = PromotionSection()
    serving: ServingSection = ServingSection()
    listen: ListenSection = ListenSection()
    limits: LimitsSection = LimitsSection()
    resources: ServiceResources = ServiceResources()
    tracking: RegistrySection = RegistrySection()

    @cached_property
    def timeline(self) -> Strategy:
        """The strategy, checked. Raises ConfigError."""
        found, problems = _strategies(self.strategy)
        if problems:
            raise ConfigError([f"service {self.name}: {one.key}: {one.text}" for one in problems])
        return found[0]

    @cached_property
    def taken(self) -> tuple[str, ...] | None:
        """The tasks that experts may be submitted for; None for any, where no data says which there are. Raises ConfigError."""
        if not self.tasks.open:
            return self.tasks.list
        if self.data is None:
            return None
        return tuple(dict.fromkeys((*self.tasks.list, *self.study().resolved().roles.adaptation)))

    @property
    def lane(self) -> Lane:
        """In which order, and how many at a time, arrivals are merged."""
        if self.order.by == "arrival":
            return Lane(batch=self.batch)
        patience = int(1000 * self.order.patience) if self.order.holes == "skip" else None
        return Lane(self.tasks.list, patience, self.batch)

    @property
    def margins(self) -> Margins:
        """How much each gate lets be lost."""
        gates = self.gates
        return Margins(
            gates.solo.min_gain, gates.accumulated.margin, gates.accumulated.worst, gates.held_out.margin, gates.drift
        )  # fmt: skip

    @property
    def tolerances(self) -> Tolerances:
        """What a candidate may do on real requests."""
        found = self.gates.canary
        return Tolerances(found.failed, found.agreement, found.slower)

    @property
    def bounds(self) -> Bounds:
        """The bounds of norms."""
        found = self.gates.geometry
        return Bounds(found.low, found.high, found.copy_cosine, found.fewest)

    def study(self) -> Study:
        """A study that scores the same data with the same model. Raises ConfigError if the service has no data."""
        if self.data is None:
            raise ConfigError(f"service {self.name}: data is missing")
        tree = {
            "name": self.name,
            "model": self.model.model_dump(mode="json"),
            "data": self.data.model_dump(mode="json", exclude_none=True),
            "budget": {"steps_per_task": 1},
            "evaluation": {
                "split": self.gates.split,
                "fraction": self.gates.fraction,
                "seed": self.gates.seed,
            },
            "grid": {"strategies": ["zero_shot"]},
        }
        return study_from(tree, f"service {self.name}")


def read_config(path: Path, overrides: Sequence[str] = ()) -> ServiceConfig:
    """The configuration in a file, with values of --set replaced. Raises ConfigError with every mistake."""
    tree = read(path)
    for text in overrides:
        override(tree, *split_override(text))
    return config_from(tree, str(path))


def config_from(tree: dict[str, Any], where: str) -> ServiceConfig:
    """The configuration in a tree, which `where` names in messages. Raises ConfigError with every mistake."""
    config, problems = validate(ServiceConfig, tree)
    if config is not None:
        problems = _strategies(config.strategy)[1] + _unusable(config)
    if problems:
        raise ConfigError([f"{where}: {one.key}: {one.text}" for one in problems])
    assert config is not None
    return config


def _strategies(strategy: str | StrategySection) -> tuple[list[Strategy], list[Problem]]:
    entry: Any = (
        strategy if isinstance(strategy, str) else strategy.model_dump(mode="json", exclude_none=True)
    )
    named, problems, _ = read_strategies([entry])
    problems = [Problem(one.key.replace("grid.strategies[0]", "strategy"), one.text) for one in problems]
    if not problems and len(named) != 1:
        problems = [
            Problem("strategy", f"stands for {len(named)} strategies; a service has one: give single values")
        ]
    if not problems and named[0].strategy.joint:
        problems = [
            Problem(
                "strategy", "trains once on all tasks together, which never arrive one by one; choose another"
            )
        ]
    if not problems and not needs_experts(named[0].strategy):
        problems = [
            Problem(
                "strategy", "serves the base whatever arrives; choose one that deploys latest, all or ema"
            )
        ]
    if not problems:
        problems = _not_served(named[0].strategy)
    return [one.strategy for one in named], problems


def _not_served(strategy: Strategy) -> list[Problem]:
    """Techniques that need more than weights, which a service does not keep."""
    try:
        check_served(strategy)
    except TechniqueError as error:
        return [Problem("strategy", str(error))]
    return []


def _unusable(config: ServiceConfig) -> list[Problem]:
    """Keys that contradict each other."""
    found = []
    try:
        config.listen.check()
    except ConfigError as error:
        found.append(Problem("listen", str(error).removeprefix("listen.")))
    resources = config.resources
    for name, default in (("address", "auto"), ("cpus", 1.0)):
        if resources.home == "local" and getattr(resources, name) != default:
            found.append(Problem(f"resources.{name}", "is for resources.home: ray; leave it out, or say so"))
    if resources.home == "ray" and not config.listen.port:
        found.append(
            Problem("listen.port", "0 lets the system choose, which Ray Serve does not say; name a port")
        )
    if config.admission.uris:
        found.append(
            Problem("admission.uris", "experts by URI are not there yet in this version; leave it out")
        )
    if config.data is None and config.gates.solo.required:
        found.append(
            Problem(
                "data",
                "is missing, so no gate can score anything; name a suite or a root, or say gates.solo.required: false",
            )
        )
    if config.order.by == "declared" and (config.tasks.open or not config.tasks.list):
        found.append(
            Problem(
                "order",
                "declared is the order of tasks.list: name all tasks there, and say tasks.open: false",
            )
        )
    if config.order.by == "declared" and config.same_task == "add":
        found.append(
            Problem("order", "declared has one place for each task; choose same_task: best or replace")
        )
    if config.batch > 1 and config.promotion.mode == "manual":
        found.append(
            Problem(
                "batch", "arrivals that a person promotes one by one are judged one by one; leave batch out"
            )
        )
    if not config.tasks.open and not config.tasks.list:
        found.append(Problem("tasks.list", "is empty and tasks.open is false, so no expert could ever come"))
    return found
