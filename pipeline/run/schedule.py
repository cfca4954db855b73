"""Which steps may start now, and in which order: pure bookkeeping over a plan's graph.

Invariant: a step is ready exactly when it is not done, not running, and everything it needs is done. Every event costs
O(log n) for each step it concerns and never a look at all steps. Steps queue in lanes, one for each kind of place that
can carry them out; within a lane the lowest rank comes first, and ranks compare across lanes.
"""

import heapq
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from typing import Any, Protocol

from pipeline.kinds.table import KINDS

Rank = tuple[float, int]


class Node(Protocol):
    """What the schedule needs of a step. One that has `gflops` is weighed by it."""

    @property
    def kind(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def inputs(self) -> Mapping[str, str]: ...
    @property
    def after(self) -> Collection[str]: ...


class Schedule:
    """The state of a study while it runs. Steps must come in topological order, as a plan gives them.

    Args:
        lane: the queue a step belongs to; by default that of its kind.
        ranks: lower goes first; by default `critical_path`.
    """

    def __init__(
        self,
        steps: Mapping[str, Node],
        done: Collection[str],
        lane: Callable[[Any], str] = lambda step: step.kind,
        ranks: Mapping[str, Rank] | None = None,
    ) -> None:
        self._steps, self._lane = steps, {fingerprint: lane(step) for fingerprint, step in steps.items()}
        self._ranks = critical_path(steps) if ranks is None else ranks
        self.done = set(done) & set(steps)
        self.running: set[str] = set()
        self._users: dict[str, list[str]] = {fingerprint: [] for fingerprint in steps}
        self._missing: dict[str, int] = {}
        self._queues: dict[str, list[tuple[Rank, str]]] = {name: [] for name in self._lane.values()}
        self._queued: set[str] = set()
        for fingerprint in steps:
            needs = self.needs(fingerprint)
            for need in needs:
                self._users[need].append(fingerprint)
            self._missing[fingerprint] = len(needs - self.done)
            self._offer(fingerprint)

    @property
    def finished(self) -> bool:
        return len(self.done) == len(self._steps)

    @property
    def lanes(self) -> Set[str]:
        """Every lane that any step belongs to."""
        return self._queues.keys()

    def needs(self, fingerprint: str) -> set[str]:
        """The steps that must be done before this one (the base is no step)."""
        step = self._steps[fingerprint]
        return {need for need in (*step.inputs.values(), *step.after) if need in self._steps}

    def lane_of(self, fingerprint: str) -> str:
        return self._lane[fingerprint]

    def first(self, lane: str) -> tuple[Rank, str] | None:
        """Rank and fingerprint of what should start next in a lane; None while nothing there is ready."""
        queue = self._queues[lane]
        while queue and not self._is_ready(queue[0][1]):
            self._queued.discard(heapq.heappop(queue)[1])
        return queue[0] if queue else None

    def start(self, fingerprint: str) -> None:
        assert self._is_ready(fingerprint)
        self.running.add(fingerprint)

    def finish(self, fingerprint: str) -> None:
        self.running.discard(fingerprint)
        if fingerprint not in self.done:
            self.done.add(fingerprint)
            for user in self._users[fingerprint]:
                self._missing[user] -= 1
                self._offer(user)

    def put_back(self, fingerprint: str) -> None:
        """The step is to run (again): it failed and will be retried, or its artifact turned out to be damaged."""
        self.running.discard(fingerprint)
        if fingerprint in self.done:
            self.done.discard(fingerprint)
            for user in self._users[fingerprint]:
                self._missing[user] += 1
        self._offer(fingerprint)

    def _is_ready(self, fingerprint: str) -> bool:
        return (
            self._missing[fingerprint] == 0
            and fingerprint not in self.done
            and fingerprint not in self.running
        )

    def _offer(self, fingerprint: str) -> None:
        """Queue a step if it is ready. What has ceased to be ready since stays queued until it comes up."""
        if self._is_ready(fingerprint) and fingerprint not in self._queued:
            self._queued.add(fingerprint)
            heapq.heappush(self._queues[self._lane[fingerprint]], (self._ranks[fingerprint], fingerprint))


class Ranked(Protocol):
    """What is asked of a plan: its steps, and its trajectories, each with its points over time."""

    @property
    def steps(self) -> Mapping[str, Any]: ...
    @property
    def trajectories(self) -> Sequence[Any]: ...


def ranks(plan: Ranked, priority: str) -> dict[str, Rank]:
    """What goes first by the study's `schedule.priority`: critical_path or trajectories."""
    if priority == "critical_path":
        return critical_path(plan.steps)
    wanted = [
        {step for point in one.points for step in (point.train, point.deployed, point.evaluate) if step}
        for one in plan.trajectories
    ]
    return in_turn(plan.steps, wanted)


def critical_path(steps: Mapping[str, Node]) -> dict[str, Rank]:
    """The longest chain of work first, so that sequential chains never starve; ties in plan order."""
    weight = _weights(steps)
    length = dict(weight)
    for fingerprint, step in reversed(list(steps.items())):
        for need in (*step.inputs.values(), *step.after):
            if need in length:
                length[need] = max(length[need], weight[need] + length[fingerprint])
    return {fingerprint: (-length[fingerprint], index) for index, fingerprint in enumerate(steps)}


def in_turn(steps: Mapping[str, Node], wanted: Sequence[Collection[str]]) -> dict[str, Rank]:
    """What the first of `wanted` (the steps of a trajectory each) takes, then what the second takes beside, and so on."""
    turn: dict[str, int] = {}
    for number, targets in enumerate(wanted):
        waiting = [fingerprint for fingerprint in targets if fingerprint in steps]
        while waiting:
            fingerprint = waiting.pop()
            if fingerprint not in turn:
                turn[fingerprint] = number
                step = steps[fingerprint]
                waiting += [need for need in (*step.inputs.values(), *step.after) if need in steps]
    last = len(wanted)
    return {fingerprint: (turn.get(fingerprint, last), index) for index, fingerprint in enumerate(steps)}


def _weights(steps: Mapping[str, Node]) -> dict[str, float]:
    """Rough cost of each step: that of its kind, and of one that trains by its share of the plan's GFLOPs where they are known."""
    costs = {
        fp: getattr(step, "gflops", None) or 0.0 for fp, step in steps.items() if KINDS[step.kind].trains
    }
    mean = sum(costs.values()) / len(costs) if costs and all(costs.values()) else 0.0
    return {
        fp: KINDS[step.kind].weight * (costs[fp] / mean if mean and fp in costs else 1.0)
        for fp, step in steps.items()
    }
