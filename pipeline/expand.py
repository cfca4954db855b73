"""One cell of the grid on its way into the plan: which steps it needs, in TIME's order.

Invariant: what goes into a spec here is all that bears on the step's result. The seed of an expert follows from the
trajectory's seed and the task's name, not from its place in the stream, so that equal experts of different streams are one.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from merge_service import timeline
from merge_service.techniques import get as technique_called
from merge_service.timeline import Base, Expert, Merged, Weights
from pipeline.config import Roles, Study
from pipeline.grid import Cell
from pipeline.steps import BASE, RECORD_BYTES, TRAIN, VERSIONS, ModelFacts, Point, Step
from pipeline.streams import Part, Stream, StreamTask
from workers.recipe import Recipe

JOINT_TASK = "multitask"


@dataclass(frozen=True)
class World:
    """What the trajectories of one model and one stream have in common."""

    model: str
    facts: ModelFacts
    base: Step
    stream: Stream
    stream_id: str


class Steps(Protocol):
    """The plan as it grows: a step that is added again is the same step."""

    study: Study
    roles: Roles
    steps: dict[str, Step]
    experts: dict[tuple[Any, ...], str]

    def add(
        self, kind: Any, spec: dict[str, Any], slug: str, label: str, t: int, task: str, **more: Any
    ) -> str: ...
    def evaluate(self, weights: str, step: Step, split: str) -> str: ...
    def own_task(self, expert: str, task: StreamTask) -> None: ...
    def sources(self, key: Any, parts: Callable[[], Iterable[Part]], split: str) -> list[dict[str, Any]]: ...
    def recipe(self, recipe: Recipe) -> tuple[dict[str, Any], str]: ...
    def engine(self, model: str) -> dict[str, Any]: ...


class Draft:
    """One cell on its way into the plan."""

    def __init__(self, planner: Steps, cell: Cell, world: World, steps: int) -> None:
        self.planner, self.cell, self.world, self.steps = planner, cell, world, steps
        self.strategy = cell.strategy
        self.tasks = joint_task(world.stream) if self.strategy.joint else world.stream.tasks
        self.experts: dict[int, str] = {}
        self.merges: dict[Merged, str] = {}
        self.experts_used: set[str] = set()
        self.merges_used: set[str] = set()
        self.recipe, self.recipe_text = planner.recipe(cell.recipe)

    def points(self) -> list[Point]:
        """t = 0 to the end of the stream; adds every step on the way."""
        planner, strategy = self.planner, self.strategy
        base, split = self.world.base, self.cell.split
        points = [Point(0, BASE, evaluate=planner.evaluate(base.fingerprint, base, split))]
        trains = timeline.needs_experts(strategy)
        needed: dict[int, list[Merged]] = {}
        for merged in timeline.needed_merges(strategy, len(self.tasks)) if trains else ():
            needed.setdefault(merged.t, []).append(merged)
        for t, task in enumerate(self.tasks, start=1):
            init = train = None
            if trains:
                init = self._ref(timeline.initial(strategy, t))
                train = self._expert(t, task)
                for merged in needed.get(t, ()):
                    self._merge(merged, task)
            deployed = timeline.deployed(strategy, t)
            fp, step = self._fingerprint(deployed), self._step(deployed)
            merge = fp if isinstance(deployed, Merged) else None
            scores = planner.evaluate(fp, step, split)
            points.append(Point(t, task.name, train, init, self._ref(deployed), merge, scores))
        return points

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
        """The expert of one task; built from scratch only if no other cell has it already."""
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
            fp = planner.experts[known] = self._train(t, task, start, replays and t > 1, steps)
            planner.own_task(fp, task)
        self.experts[t] = fp
        self.experts_used.add(fp)
        return fp

    def _train(self, t: int, task: StreamTask, start: Weights, replays: bool, steps: int) -> str:
        planner, world = self.planner, self.world
        init = self._fingerprint(start)
        pool = planner.roles.pretraining if self.cell.recipe.mixture.pretraining > 0 else ()
        spec = {
            "version": VERSIONS["train"],
            "init": init,
            "update": planner.sources(task.parts, lambda: task.parts, TRAIN),
            "buffer": planner.sources(
                (world.stream_id, t) if replays else (),
                lambda: together(self.tasks[: t - 1]) if replays else (),
                TRAIN,
            ),
            "pretraining": planner.sources((*pool,), lambda: map(Part, pool), TRAIN),
            "recipe": self.recipe,
            "steps": steps,
            "seed": _task_seed(self.cell.seed, task.name),
            "engine": planner.engine(world.model),
            **world.facts.training,
        }
        how = self._how(start)
        return planner.add(
            "train",
            spec,
            f"t{t}-{task.name}-init_{how}",
            f"t{t} {task.name}: expert from {how}{' with replay' if replays else ''}",
            t,
            task.name,
            inputs={"init": init},
            gflops=self.gflops(steps),
            disk_bytes=world.facts.weights_bytes + RECORD_BYTES,
            base=world.base.fingerprint,
            model=world.model,
        )

    def _merge(self, merged: Merged, task: StreamTask) -> None:
        planner, strategy = self.planner, self.strategy
        parents = timeline.parents(strategy, merged)
        inputs = {self._id(parent, merged): self._fingerprint(parent) for parent in parents}
        base = self.world.base.fingerprint
        spec = {
            "version": VERSIONS["merge"] + (not self.world.facts.resblocks),
            "technique": strategy.technique,
            "params": timeline.params_for(strategy, merged),
            "form": merged.form,
            "base": base,
            "inputs": [[name, fp] for name, fp in inputs.items()],
        }
        origin = technique_called(str(strategy.technique)).origin
        if origin is not None:  # a technique of one's own: what it does is what its file says
            spec["source"] = origin.source
        earlier = self.merges.get(Merged(merged.policy, merged.t - 1))
        what = f"{merged.policy}-{strategy.technique}"
        fp = planner.add(
            "merge",
            spec,
            f"t{merged.t}-merge_{what}-init_{strategy.init}",
            f"t{merged.t} {task.name}: {strategy.technique} ({merged.policy}) of experts from {strategy.init}",
            merged.t,
            task.name,
            inputs={"base": base, **inputs},
            after=() if earlier is None else (earlier,),
            disk_bytes=self.world.facts.weights_bytes + RECORD_BYTES,
            base=base,
            model=self.world.model,
        )
        self.merges[merged] = fp
        self.merges_used.add(fp)

    def _id(self, parent: Weights, merged: Merged) -> str:
        """t3 for the expert of task 3; running-2 for what a fold has after task 2, whatever that is."""
        if merged.policy == "ema" and not (isinstance(parent, Expert) and parent.t == merged.t):
            return f"running-{merged.t - 1}"
        assert isinstance(parent, Expert)
        return f"t{parent.t}"

    def _how(self, start: Weights) -> str:
        if isinstance(start, Base):
            return BASE
        return "latest" if isinstance(start, Expert) else f"{start.policy}-{self.strategy.technique}"

    def gflops(self, steps: int) -> float | None:
        """What training an expert for so many steps costs, forward and backward."""
        recipe = self.cell.recipe
        cost = self.world.facts.gflops_per_sample.get(recipe.trainable)
        return None if cost is None else cost * recipe.batch_size * steps


def joint_task(stream: Stream) -> tuple[StreamTask, ...]:
    """All tasks of a stream as one."""
    return (StreamTask(JOINT_TASK, together(stream.tasks)),)


def together(tasks: Sequence[StreamTask]) -> tuple[Part, ...]:
    """What several tasks bring, each dataset once: its classes of all tasks, in the order of arrival."""
    whole: dict[str, bool] = {}
    classes: dict[str, list[str]] = {}
    for part in (part for task in tasks for part in task.parts):
        whole[part.dataset] = whole.get(part.dataset, False) or part.classes is None
        classes.setdefault(part.dataset, []).extend(part.classes or ())
    return tuple(
        Part(dataset, None if whole[dataset] else tuple(dict.fromkeys(names)))
        for dataset, names in classes.items()
    )


def effective_params(cell: Cell) -> dict[str, Any]:
    """The technique's effective parameters, of all forms that a cell uses."""
    if not timeline.policies(cell.strategy):
        return {}
    params: dict[str, Any] = {}
    for policy in timeline.policies(cell.strategy):
        resolved = timeline.params_for(cell.strategy, Merged(policy, 1))
        params |= resolved
    if cell.strategy.params.get("weights") is not None and "weights" in params:
        params["weights"] = list(cell.strategy.params["weights"])
    return params


def _task_seed(seed: int, task: str) -> int:
    """A seed of its own for every task, so that no two tasks see the same draws, wherever they stand in the stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task}".encode()).digest()[:4], "big") >> 1
