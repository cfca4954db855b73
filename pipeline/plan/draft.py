"""The steps of one cell of the grid, in the order of TIME.

Invariant: a spec made here holds everything that determines the result of its step. The seed of an expert depends on
the seed of the trajectory and the name of the task, not on its position in the stream, so that equal experts of
different streams are one.
"""

import hashlib
import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from merge_service import timelines as timeline
from merge_service.techniques import Evidence
from merge_service.techniques import get as technique_called
from merge_service.timelines import Base, Expert, Merged, Strategy, Weights
from pipeline.kinds.specs import ExpertSpec, MergeSpec, SourceSpec, Spec, TrainSpec
from pipeline.kinds.table import KINDS
from pipeline.plan.learning import Learner, Learning
from pipeline.plan.measuring import Measured, Measurer, Measuring
from pipeline.plan.steps import BASE, RECORD_BYTES, TRAIN, About, Point, Step, World
from pipeline.store.open import is_url
from pipeline.study.config import Roles, Study
from pipeline.study.grid import Cell
from pipeline.study.streams import Part, Stream, StreamTask
from workers.training.recipe import Recipe

JOINT_TASK = "multitask"


class Steps(Protocol):
    """The plan under construction: a step that is added again is the same step."""

    study: Study
    roles: Roles
    steps: dict[str, Step]
    experts: dict[tuple[Any, ...], str]

    def add(self, spec: Spec, about: About) -> str: ...
    def evaluate(self, weights: str, step: Step, split: str) -> str: ...
    def own_task(self, expert: str, task: StreamTask) -> None: ...
    def sources(self, key: Hashable, parts: Callable[[], Iterable[Part]], split: str) -> list[SourceSpec]: ...
    def recipe(self, recipe: Recipe) -> tuple[Mapping[str, object], str]: ...
    def engine(self, model: str) -> Mapping[str, object]: ...
    def measuring_engine(self, model: str) -> Mapping[str, object]: ...


class Draft:
    """Adds the steps of one cell to the plan."""

    def __init__(self, planner: Steps, cell: Cell, world: World, steps: int) -> None:
        self.planner, self.cell, self.world, self.steps = planner, cell, world, steps
        self.strategy = cell.strategy
        self.tasks = joint_task(world.stream) if self.strategy.joint else world.stream.tasks
        self.experts: dict[int, str] = {}
        self.merges: dict[Merged, str] = {}
        self.experts_used: set[str] = set()
        self.merges_used: set[str] = set()
        self.recipe, self.recipe_text = planner.recipe(cell.recipe)
        self.measurers: dict[Evidence, Measurer] = {}
        engine = planner.measuring_engine(world.model)
        self.learner = Learner(planner.add, world, Learning(cell.learning, engine))

    def points(self) -> list[Point]:
        """The points from t = 0 to the end of the stream; adds all of their steps."""
        planner, strategy = self.planner, self.strategy
        base, split = self.world.base, self.cell.split
        points = [Point(0, BASE, evaluate=planner.evaluate(base.fingerprint, base, split))]
        trains = timeline.needs_experts(strategy)
        for t, task in enumerate(self.tasks, start=1):
            init = train = None
            if trains:
                init = self._ref(timeline.initial(strategy, t))
                train = self._expert(t, task)
                for made in timeline.derivations(strategy, t, last=t == len(self.tasks)):
                    self._merge(made, task)
            deployed = timeline.deployed(strategy, t)
            fp, step = self._fingerprint(deployed), self._step(deployed)
            merge = fp if isinstance(deployed, Merged) else None
            scores = planner.evaluate(fp, step, split)
            points.append(Point(t, task.name, train, init, self._ref(deployed), merge, scores))
        return points

    @property
    def measured(self) -> Mapping[str, float | None]:
        """The steps that measure something for this cell, with their GFLOPs."""
        return {step: cost for one in self.measurers.values() for step, cost in one.used.items()}

    def _fingerprint(self, weights: Weights) -> str:
        if isinstance(weights, Base):
            return self.world.base.fingerprint
        return self.experts[weights.t] if isinstance(weights, Expert) else self.merges[weights]

    def _ref(self, weights: Weights) -> str:
        return BASE if isinstance(weights, Base) else self._fingerprint(weights)

    def _step(self, weights: Weights) -> Step:
        return (
            self.world.base if isinstance(weights, Base) else self.planner.steps[self._fingerprint(weights)]
        )

    def _expert(self, t: int, task: StreamTask) -> str:
        """The expert of one task; its spec is built only if no other cell has the same expert."""
        planner = self.planner
        start = timeline.initial(self.strategy, t)
        replays = self.cell.recipe.mixture.buffer > 0
        steps = self.steps * (len(self.world.stream.tasks) if self.strategy.joint else 1)
        place = (self.world.stream_id, t) if replays else task
        known = (
            self._fingerprint(start),
            place,
            self.strategy.joint,
            self.recipe_text,
            steps,
            self.cell.seed,
        )
        fp = planner.experts.get(known)
        if fp is None:
            given = bool(self.world.experts)
            fp = self._given(t, task) if given else self._train(t, task, start, replays and t > 1, steps)
            planner.experts[known] = fp
            planner.own_task(fp, task)
        self.experts[t] = fp
        self.experts_used.add(fp)
        return fp

    def _given(self, t: int, task: StreamTask) -> str:
        """The expert that the study gives for a task."""
        world = self.world
        spec = ExpertSpec(KINDS["expert"].revision, world.experts[task.name], world.base.fingerprint)
        about = About(
            f"t{t}-{task.name}-given",
            f"t{t} {task.name}: given expert",
            t,
            task.name,
            disk_bytes=world.facts.weights_bytes + RECORD_BYTES,
            base=world.base.fingerprint,
            model=world.model,
        )
        return self.planner.add(spec, about)

    def _train(self, t: int, task: StreamTask, start: Weights, replays: bool, steps: int) -> str:
        planner, world = self.planner, self.world
        pool = planner.roles.pretraining if self.cell.recipe.mixture.pretraining > 0 else ()
        spec = TrainSpec(
            version=KINDS["train"].revision,
            init=self._fingerprint(start),
            update=planner.sources(task.parts, lambda: task.parts, TRAIN),
            buffer=planner.sources(
                (world.stream_id, t) if replays else (),
                lambda: together(self.tasks[: t - 1]) if replays else (),
                TRAIN,
            ),
            pretraining=planner.sources((*pool,), lambda: map(Part, pool), TRAIN),
            recipe=self.recipe,
            steps=steps,
            seed=_task_seed(self.cell.seed, task.name),
            engine=planner.engine(world.model),
            training=world.facts.training,
        )
        how = self._how(start)
        about = About(
            f"t{t}-{task.name}-init_{how}",
            f"t{t} {task.name}: expert from {how}{' with replay' if replays else ''}",
            t,
            task.name,
            gflops=self.gflops(steps),
            disk_bytes=self._expert_bytes() + RECORD_BYTES,
            base=world.base.fingerprint,
            model=world.model,
        )
        return planner.add(spec, about)

    def _expert_bytes(self) -> int:
        """Bytes that are kept of an expert: its adapter, if it is one, and its weights, if they are not made of that. A store at a URL keeps both."""
        facts, recipe = self.world.facts, self.cell.recipe
        adapter = facts.adapter_bytes.get(recipe.trains) if recipe.adapter is not None else None
        if adapter is None:
            return facts.weights_bytes
        return adapter + (facts.weights_bytes if is_url(self.planner.study.storage.store) else 0)

    def _merge(self, merge: timeline.Merge, task: StreamTask) -> None:
        merged, technique, init = merge.result, merge.technique, self.strategy.init
        base = self.world.base.fingerprint
        origin = technique_called(technique).origin
        spec = MergeSpec(
            version=KINDS["merge"].revision + (not self.world.facts.resblocks),
            technique=technique,
            params=dict(merge.params),
            form=merged.form,
            base=base,
            members=[*zip(merge.ids(), map(self._fingerprint, merge.members))],
            source=None if origin is None else origin.source,  # a user's technique is defined by its file
            statistics=self._statistics(merge),
        )
        earlier = self.merges.get(Merged(merged.policy, merged.t - 1))
        about = About(
            f"t{merged.t}-merge_{merged.policy}-{technique}-init_{init}",
            f"t{merged.t} {task.name}: {technique} ({merged.policy}) of experts from {init}",
            merged.t,
            task.name,
            after=() if earlier is None else (earlier,),
            disk_bytes=self.world.facts.weights_bytes + RECORD_BYTES,
            base=base,
            model=self.world.model,
        )
        fp = self.planner.add(spec, about)
        self.merges[merged] = fp
        self.merges_used.add(fp)

    def _statistics(self, merge: timeline.Merge) -> list[tuple[str, str]]:
        """(id, measure step) of every expert of a merge, where its technique needs them."""
        asked = technique_called(merge.technique).asked(merge.params)
        if asked is None:
            return []
        if asked.of == "learned":
            return [*zip(merge.ids(), itertools.repeat(self._learned(merge)))]
        if asked not in self.measurers:
            engine = self.planner.measuring_engine(self.world.model)
            how = Measuring(asked, self.cell.statistics, engine)
            self.measurers[asked] = Measurer(self.planner.add, self.world, how)
        measurer, experts = self.measurers[asked], [one for one in merge.members if isinstance(one, Expert)]
        tasks = [self.tasks[one.t - 1] for one in experts]
        data = [self.planner.sources(task.parts, _parts_of(task), TRAIN) for task in tasks]
        models = [self.experts[one.t] for one in experts]
        if asked.of == "experts":
            step = measurer.together(tasks, Measured(models, data, dict(merge.params)))
            steps = [step] * len(experts)
        else:
            every = zip(experts, models, tasks, data)
            steps = [measurer.of(one.t, model, task, of) for one, model, task, of in every]
        return [*zip(merge.ids(), steps)]

    def _learned(self, merge: timeline.Merge) -> str:
        """The learn step of a merge, on the tasks whose data the strategy may read: those so far, or the new one alone."""
        t, replays = merge.result.t, self.cell.recipe.mixture.buffer > 0
        tasks = self.tasks[:t] if replays else self.tasks[t - 1 : t]
        data = [self.planner.sources(task.parts, _parts_of(task), TRAIN) for task in tasks]
        return self.learner.of(
            merge, tasks, Measured([*map(self._fingerprint, merge.members)], data, merge.params)
        )

    def _how(self, start: Weights) -> str:
        if isinstance(start, Base):
            return BASE
        return "latest" if isinstance(start, Expert) else f"{start.policy}-{self.strategy.technique}"

    def gflops(self, steps: int) -> float | None:
        """The cost of training an expert for `steps` steps, forward and backward."""
        recipe = self.cell.recipe
        cost = self.world.facts.gflops_per_sample.get(recipe.trains)
        return None if cost is None else cost * recipe.batch_size * steps


def _parts_of(task: StreamTask) -> Callable[[], Iterable[Part]]:
    return lambda: task.parts


def joint_task(stream: Stream) -> tuple[StreamTask, ...]:
    """All tasks of a stream as one."""
    return (StreamTask(JOINT_TASK, together(stream.tasks)),)


def together(tasks: Sequence[StreamTask]) -> tuple[Part, ...]:
    """The parts of several tasks, each dataset once with its classes of all tasks, in the order of arrival."""
    whole: dict[str, bool] = {}
    classes: dict[str, list[str]] = {}
    for part in (part for task in tasks for part in task.parts):
        whole[part.dataset] = whole.get(part.dataset, False) or part.classes is None
        classes.setdefault(part.dataset, []).extend(part.classes or ())
    return tuple(
        Part(dataset, None if whole[dataset] else tuple(dict.fromkeys(names)))
        for dataset, names in classes.items()
    )


def effective_params(strategy: Strategy) -> dict[str, object]:
    """The resolved parameters of the technique, over all forms that a strategy uses."""
    params: dict[str, object] = {}
    for policy in timeline.policies(strategy):
        params |= timeline.params_for(strategy, Merged(policy, 1))
    if strategy.params.get("weights") is not None and "weights" in params:
        params["weights"] = list(strategy.params["weights"])
    return params


def _task_seed(seed: int, task: str) -> int:
    """A separate seed for every task, so that no two tasks get the same draws, whatever their position in the stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task}".encode()).digest()[:4], "big") >> 1
