"""The values of a plan: facts as its input, steps and trajectories as its output, all frozen and serialisable as JSON.

Invariant: the `spec` of a step holds what determines its result and nothing else, and its fingerprint is that of kind
and spec. Labels, slugs, costs and `after` serve display and scheduling and are never part of the identity.
"""

import importlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NotRequired, Protocol, TypedDict

from pipeline.identity import fingerprint
from pipeline.kinds.specs import BASE
from pipeline.kinds.table import KINDS, STEPS
from pipeline.study.streams import Stream

TRAIN, TEST, VAL = "train", "test", "val"
SPLITS = (TEST, VAL)
"""The splits on which models can be scored."""
RECORD_BYTES = 16 * 1024
"""A generous estimate of the size of a record."""


class DescribedSplit(Protocol):
    """A split of a dataset: the digest of its content, and its number of samples."""

    @property
    def digest(self) -> str: ...
    @property
    def samples(self) -> int: ...


class Described(Protocol):
    """A dataset as `workers.data` describes it."""

    @property
    def kind(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def templates(self) -> tuple[str, ...]: ...
    @property
    def splits(self) -> Mapping[str, DescribedSplit]: ...


@dataclass(frozen=True)
class DatasetFacts:
    """A dataset's content: its kind, the digest and number of samples of each split, and the digest of kind, class names and prompts.

    `stored` names the splits whose pictures training cuts out of the originals; their digest says so. `classes` is their number.
    """

    digests: Mapping[str, str]
    prompts: str = ""
    samples: Mapping[str, int] = field(default_factory=dict)
    kind: str = "classification"
    stored: tuple[str, ...] = ()
    classes: int = 0

    @classmethod
    def of(cls, info: Described) -> "DatasetFacts":
        """The facts of a dataset from the output of `workers.data.manifest.describe`."""
        return cls(
            digests={name: split.digest for name, split in info.splits.items()},
            prompts=fingerprint([info.kind, list(info.classes), list(info.templates)]),
            samples={name: split.samples for name, split in info.splits.items()},
            kind=info.kind,
            classes=len(info.classes),
        )


@dataclass(frozen=True)
class ModelFacts:
    """The identity and the training cost of a base model.

    `gflops_per_sample` (forward + backward) and `memory_ratio` (peak memory relative to training everything) are by
    what is trained (`Recipe.trains`); they may be empty unless the budget is in GFLOPs. `weights_bytes` is the size of
    a checkpoint, `adapter_bytes` that of an adapter, by what is trained, where it was measured. `resblocks`: whether both towers are open_clip's own transformers. `training` holds what the network
    determines of its training; other networks do not have it. `notes` are for display.
    """

    weights: str
    config: str = ""
    gflops_per_sample: Mapping[str, float] = field(default_factory=dict)
    memory_ratio: Mapping[str, float] = field(default_factory=lambda: {"all": 1.0})
    weights_bytes: int = 0
    resblocks: bool = True
    training: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    adapter_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """All inputs of a plan beside the study. They contain no paths.

    `models` and `streams` are keyed by the fingerprint of the section that names them (`key_of`). `missing` are
    datasets of which only the description is known: enough to plan with, not to run. `notes` are remarks on the data. `experts` are the
    sha256 of the experts that are given, by task.
    """

    datasets: Mapping[str, DatasetFacts]
    models: Mapping[str, ModelFacts]
    streams: Mapping[str, Stream]
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    experts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Step:
    """One unit of work. `inputs` maps roles to fingerprints; `after` are steps to wait for whose results are not used.

    `base` is the fingerprint of the base that the step descends from, `model` the name of that base in the study.
    """

    kind: str
    fingerprint: str
    slug: str
    label: str
    t: int
    task: str
    spec: dict[str, Any]
    inputs: dict[str, str]
    after: tuple[str, ...] = ()
    gflops: float | None = 0.0
    disk_bytes: int = 0
    base: str = ""
    model: str = ""


@dataclass(frozen=True)
class About:
    """The fields of `Step` for display and scheduling, which are not part of its identity."""

    slug: str
    label: str
    t: int
    task: str
    after: tuple[str, ...] = ()
    gflops: float | None = 0.0
    disk_bytes: int = 0
    base: str = ""
    model: str = ""


@dataclass(frozen=True)
class World:
    """What the trajectories of one model and one stream share. `experts` are the sha256 of those that are given, by task."""

    model: str
    facts: ModelFacts
    base: Step
    stream: Stream
    stream_id: str
    datasets: Mapping[str, DatasetFacts]
    experts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Point:
    """One trajectory at one time step, as fingerprints; the base is "base", and None means that there is no such step.

    `init` are the weights at the start of training, `train` the expert, `deployed` the served weights, `merge` the step
    that made them if it was a merge, `evaluate` their scores, and `own` the step that scores the expert on (at least)
    its own task.
    """

    t: int
    task: str
    train: str | None = None
    init: str | None = None
    deployed: str = BASE
    merge: str | None = None
    evaluate: str = ""
    own: str | None = None


@dataclass(frozen=True)
class TrajectoryPlan:
    """One strategy over one stream, budget and seed. Trajectories that differ only in the seed share `group`.

    `split` is the split of the scores. `base` is the fingerprint of the base and `model` its name; `stream` are the
    names of the tasks and `stream_id` is the fingerprint of the stream. `settings_id` is the
    key of its settings in `Plan.settings`.
    """

    id: str
    group: str
    name: str
    init: str
    deploy: str
    technique: str | None
    params: dict[str, Any]
    ema_seed: str | None
    budget: dict[str, Any]
    seed: int
    stream: tuple[str, ...]
    points: tuple[Point, ...]
    base: str
    model: str
    stream_id: str
    axes: dict[str, Any] = field(default_factory=dict)
    split: str = TEST
    settings_id: str = ""


class StepCounts(TypedDict):
    """Steps of one kind: of the plan, of the trajectories one by one, and in the store already."""

    unique: int
    naive: int
    cached: int


class Summary(TypedDict):
    """What a plan would run (`Plan.summary`). `gflops_measuring` is the part of `gflops` that measures experts, `gflops_learning` that
    which learns merges, where there are any."""

    study: str
    trajectories: int
    steps: dict[str, StepCounts]
    gflops: float | None
    gflops_measuring: NotRequired[float | None]
    gflops_learning: NotRequired[float | None]
    disk_bytes: int
    gflops_naive: float | None
    critical_path: dict[str, int]
    missing: list[str]
    splits: list[str]


class Lookup(Protocol):
    """The part of a store that a summary needs."""

    def has(self, kind: str, fingerprint: str) -> bool: ...


@dataclass(frozen=True)
class Plan:
    """All steps of a study, each once, in an order in which every step follows its inputs.

    `bases` holds the base of every model by fingerprint. `streams` maps the fingerprint of each stream to its tasks,
    and these to the datasets that they contain as a whole (a task of parts of datasets has no score of its own).
    `classes` resolves the digests that stand for lists of classes in specs. `naive` counts the steps of all
    trajectories run separately, and `naive_gflops` is the cost of their training. `missing` are datasets that must be
    there before the plan can run. `zero_shot_groups` are the held-out sets by group, empty in plans older than groups;
    `own_groups` says that they are stated and differ from those derived from the pretraining pool. `settings` are
    those of trajectories (`pipeline.plan.settings`) by key, and `retrieval` the datasets whose score is recall@5 (of others it is
    accuracy); both are empty in plans older than they are.
    """

    study: str
    bases: dict[str, Step]
    steps: Mapping[str, Step]
    trajectories: tuple[TrajectoryPlan, ...]
    streams: dict[str, dict[str, tuple[str, ...]]]
    classes: dict[str, tuple[str, ...]]
    adaptation: tuple[str, ...]
    held_out: tuple[str, ...]
    naive: dict[str, int]
    naive_gflops: float | None = None
    missing: tuple[str, ...] = ()
    zero_shot_groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    own_groups: bool = False
    settings: dict[str, dict[str, object]] = field(default_factory=dict)
    retrieval: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """The plan as in plan.json. `pipeline.plan.file` imports this module, so it is imported here only when needed."""
        return dict(importlib.import_module("pipeline.plan.file").encode(self))

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits on which trajectories are scored, test first."""
        scored = {trajectory.split for trajectory in self.trajectories}
        return tuple(split for split in SPLITS if split in scored)

    def served_alike(self, trajectory: TrajectoryPlan, split: str) -> TrajectoryPlan | None:
        """The first trajectory scored on `split` that serves the same weights at every t; None if there is none."""

        def served(one: TrajectoryPlan) -> list[str]:
            return [one.base, *(point.deployed for point in one.points)]

        alike = (t for t in self.trajectories if t.split == split and t.seed == trajectory.seed)
        return next((one for one in alike if served(one) == served(trajectory)), None)

    def tasks(self, trajectory: TrajectoryPlan) -> dict[str, tuple[str, ...]]:
        """Each task of a trajectory with the datasets that it contains as a whole."""
        return self.streams[trajectory.stream_id]

    def trains(self, trajectory: TrajectoryPlan) -> bool:
        """Whether a trajectory has experts."""
        return any(point.train for point in trajectory.points)

    def weights_step(self, fingerprint: str) -> Step:
        """The step, or base, that makes these weights."""
        return self.bases.get(fingerprint) or self.steps[fingerprint]

    @property
    def fingerprint(self) -> str:
        """Identity of the plan: study name, trajectories, all of their steps, and groups that the study states itself."""
        names = [one.name for one in fields(Point)]
        points = {
            trajectory.id: [[getattr(point, name) for name in names] for point in trajectory.points]
            for trajectory in self.trajectories
        }
        own = {"zero_shot_groups": self.zero_shot_groups} if self.own_groups else {}
        return fingerprint({"study": self.study, "base": "+".join(self.bases), "trajectories": points, **own})

    def summary(self, store: Lookup | None = None) -> Summary:
        """What would run: counts per kind, and compute, disk and critical path of the steps that are not in the store yet.

        "gflops" is null if the cost of a sample was not measured. "critical_path" is the longest chain of dependent
        steps, by kind: no number of machines makes the study shorter.
        """
        cached = {fp for fp, step in self.steps.items() if store is not None and store.has(step.kind, fp)}
        ahead = {fp: step for fp, step in self.steps.items() if fp not in cached}
        present = {step.kind for step in self.steps.values()}
        counts: dict[str, StepCounts] = {
            kind: {
                "unique": sum(step.kind == kind for step in self.steps.values()),
                "naive": self.naive.get(kind, 0),
                "cached": sum(self.steps[fp].kind == kind for fp in cached),
            }
            for kind in shown(present)
        }
        found: Summary = {
            "study": self.study,
            "trajectories": len(self.trajectories),
            "steps": counts,
            "gflops": total_gflops(step.gflops for step in ahead.values()),
            "disk_bytes": sum(step.disk_bytes for step in ahead.values()),
            "gflops_naive": self.naive_gflops,
            "critical_path": critical_path(ahead, shown(present)),
            "missing": list(self.missing),
            "splits": list(self.splits),
        }
        spent = {
            kind: total_gflops(step.gflops for step in ahead.values() if step.kind == kind)
            for kind in present
        }
        if "measure" in spent:
            found["gflops_measuring"] = spent["measure"]
        if "learn" in spent:
            found["gflops_learning"] = spent["learn"]
        return found

    @property
    def kinds(self) -> Mapping[str, str]:
        """The kind of every step by its fingerprint."""
        known: Mapping[str, str] | None = getattr(self.steps, "kinds", None)
        return known or {fingerprint: step.kind for fingerprint, step in self.steps.items()}


def shown(present: Collection[str]) -> tuple[str, ...]:
    """The kinds that summaries of a plan list, of which these are present."""
    return tuple(name for name in STEPS if name in present or not KINDS[name].seldom)


def critical_path(steps: Mapping[str, Step], kinds: Iterable[str] | None = None) -> dict[str, int]:
    """Steps of each of `kinds` (by default those that a summary of `steps` lists) on the longest chain through `steps`, which are in topological order; "steps" is its length.

    The longest chain is the one with most training, then with most steps, because training takes most of the time.
    """
    best: dict[str, tuple[int, int]] = {}
    before: dict[str, str | None] = {}
    for fp, step in steps.items():
        needs = [need for need in (*step.inputs.values(), *step.after) if need in best]
        last = max(needs, key=best.__getitem__, default=None)
        trained, length = best[last] if last is not None else (0, 0)
        best[fp], before[fp] = (trained + KINDS[step.kind].trains, length + 1), last
    listed = shown({step.kind for step in steps.values()}) if kinds is None else kinds
    counts: dict[str, int] = {"steps": 0, **dict.fromkeys(listed, 0)}
    current = max(best, key=best.__getitem__, default=None)
    while current is not None:
        counts["steps"] += 1
        counts[steps[current].kind] += 1
        current = before[current]
    return counts


def without_val(datasets: Sequence[str], root: str) -> str:
    """The message for datasets that are to be scored on val and have no such split."""
    place = f"{root}/{datasets[0]}/{VAL}"
    return (
        f"evaluation.split is {VAL}, but there is no {VAL} split of {', '.join(datasets)}; write {place} and the like (shards "
        f"as in {TEST}), or set evaluation.split to {TEST}"
    )


def total_gflops(costs: Iterable[float | None]) -> float | None:
    """The sum of the costs; None if one of them is not known."""
    total = 0.0
    for cost in costs:
        if cost is None:
            return None
        total += cost
    return total
