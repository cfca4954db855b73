"""Which steps can start now, and in which order: pure bookkeeping over the graph of a plan.

Invariant: a step is ready exactly when it is neither done nor running and everything that it needs is done. An event
costs O(log n) per step concerned and never scans all steps. Steps queue in lanes, one for each group of workers that
can carry them out. In a lane the lowest rank comes first, and ranks are comparable across lanes.
"""

import heapq
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from typing import Generic, Protocol, TypeVar

from pipeline.kinds.table import KINDS

Rank = tuple[float, int]


class Node(Protocol):
    """The part of a step that the schedule needs. `gflops`, if present, is used as its weight."""

    @property
    def kind(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def inputs(self) -> Mapping[str, str]: ...
    @property
    def after(self) -> Collection[str]: ...


Planned = TypeVar("Planned", bound=Node)


def by_kind(step: Node) -> str:
    """One lane for each kind of step."""
    return step.kind


class Schedule(Generic[Planned]):
    """The state of a study while it runs. Steps must come in topological order, as a plan gives them.

    Args:
        lane: the queue of a step; by default that of its kind.
        ranks: lower goes first; by default `critical_path`.
    """

    def __init__(
        self,
        steps: Mapping[str, Planned],
        done: Collection[str],
        lane: Callable[[Planned], str] = by_kind,
        ranks: Mapping[str, Rank] | None = None,
    ) -> None:
        self._steps, self._lane = steps, {fingerprint: lane(step) for fingerprint, step in steps.items()}
        self._ranks = critical_path(steps) if ranks is None else ranks
        self._weight, self._length = weights(steps), lengths(steps)
        self.done = set(done) & set(steps)
        self.running: set[str] = set()
        self._users: dict[str, list[str]] = {fingerprint: [] for fingerprint in steps}
        self._missing: dict[str, int] = {}
        self._queues: dict[str, list[tuple[Rank, str]]] = {name: [] for name in self._lane.values()}
        self._queued: set[str] = set()
        self._left = sum(
            weight for fingerprint, weight in self._weight.items() if fingerprint not in self.done
        )
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
        """The lanes of all steps."""
        return self._queues.keys()

    def needs(self, fingerprint: str) -> set[str]:
        """The steps that must be done before this one (the base is not a step)."""
        step = self._steps[fingerprint]
        return {need for need in (*step.inputs.values(), *step.after) if need in self._steps}

    def lane_of(self, fingerprint: str) -> str:
        return self._lane[fingerprint]

    def first(self, lane: str) -> tuple[Rank, str] | None:
        """Rank and fingerprint of the next step to start in a lane; None if none is ready."""
        queue = self._queues[lane]
        while queue and not self._is_ready(queue[0][1]):
            self._queued.discard(heapq.heappop(queue)[1])
        return queue[0] if queue else None

    def has_spare_time(self, workers: int) -> bool:
        """Whether the remaining work, shared among `workers`, takes longer than the longest remaining chain.

        If so, a short step may go first, and the run ends no later. Ranks must be those of `critical_path`.
        """
        heads = [first[1] for lane in self._queues if (first := self.first(lane)) is not None]
        chain = max((self._length[head] for head in (*heads, *self.running)), default=0.0)
        return self._left / max(workers, 1) > chain

    def start(self, fingerprint: str) -> None:
        assert self._is_ready(fingerprint)
        self.running.add(fingerprint)

    def finish(self, fingerprint: str) -> None:
        self.running.discard(fingerprint)
        if fingerprint not in self.done:
            self.done.add(fingerprint)
            self._left -= self._weight[fingerprint]
            for user in self._users[fingerprint]:
                self._missing[user] -= 1
                self._offer(user)

    def put_back(self, fingerprint: str) -> None:
        """Mark a step as not done: it failed and will be retried, or its artifact is damaged."""
        self.running.discard(fingerprint)
        if fingerprint in self.done:
            self.done.discard(fingerprint)
            self._left += self._weight[fingerprint]
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
        """Queue a step if it is ready. A queued step that is no longer ready is discarded when it comes up."""
        if self._is_ready(fingerprint) and fingerprint not in self._queued:
            self._queued.add(fingerprint)
            heapq.heappush(self._queues[self._lane[fingerprint]], (self._ranks[fingerprint], fingerprint))


class Place(Protocol):
    """A trajectory at one time step: the steps that it takes there."""

    @property
    def t(self) -> int: ...
    @property
    def train(self) -> str | None: ...
    @property
    def deployed(self) -> str: ...
    @property
    def evaluate(self) -> str: ...


class Walk(Protocol):
    """A trajectory over time."""

    @property
    def points(self) -> Sequence[Place]: ...


class Ranked(Protocol):
    """The part of a plan that ranks need: its steps, and its trajectories with their points over time."""

    @property
    def steps(self) -> Mapping[str, Node]: ...
    @property
    def trajectories(self) -> Sequence[Walk]: ...


def ranks(plan: Ranked, priority: str) -> dict[str, Rank]:
    """Ranks by the study's `schedule.priority`: critical_path or trajectories."""
    if priority == "critical_path":
        return rows_first(plan, critical_path(plan.steps))
    wanted = [
        {step for point in one.points for step in (point.train, point.deployed, point.evaluate) if step}
        for one in plan.trajectories
    ]
    return in_turn(plan.steps, wanted)


def critical_path(steps: Mapping[str, Node]) -> dict[str, Rank]:
    """Ranks with the longest chain of work first, so that sequential chains never starve; ties in plan order."""
    length = lengths(steps)
    return {fingerprint: (-length[fingerprint], index) for index, fingerprint in enumerate(steps)}


def lengths(steps: Mapping[str, Node]) -> dict[str, float]:
    """Rough cost of the longest chain of steps that begins with each step."""
    weight = weights(steps)
    length = dict(weight)
    for fingerprint, step in reversed(list(steps.items())):
        for need in (*step.inputs.values(), *step.after):
            if need in length:
                length[need] = max(length[need], weight[need] + length[fingerprint])
    return length


def rows_first(plan: Ranked, known: Mapping[str, Rank]) -> dict[str, Rank]:
    """The same ranks, with evaluations that no step needs reordered so that trajectories get a GM early: earlier t before later,
    and scores of experts on their own task last. They exchange places only among themselves, so no other step starts later.
    """
    when: dict[str, tuple[int, int]] = {}
    for place, one in enumerate(plan.trajectories):
        for point in one.points:
            when[point.evaluate] = min(when.get(point.evaluate, (point.t, place)), (point.t, place))
    by_weight: dict[float, list[str]] = {}
    for fingerprint, step in plan.steps.items():
        if KINDS[step.kind].scores:
            by_weight.setdefault(known[fingerprint][0], []).append(fingerprint)
    found = dict(known)
    for alike in by_weight.values():
        places = sorted(known[fingerprint] for fingerprint in alike)
        last = (len(plan.steps), 0)
        wanted = sorted(alike, key=lambda fingerprint: (when.get(fingerprint, last), known[fingerprint]))
        found.update(zip(wanted, places))
    return found


def in_turn(steps: Mapping[str, Node], wanted: Sequence[Collection[str]]) -> dict[str, Rank]:
    """Ranks with the steps of the first of `wanted` (one set per trajectory) first, then the further steps of the
    second, and so on.
    """
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


def weights(steps: Mapping[str, Node]) -> dict[str, float]:
    """Rough cost of each step: that of its kind, scaled for training by its share of the plan's GFLOPs if they are known."""
    costs = {
        fp: getattr(step, "gflops", None) or 0.0 for fp, step in steps.items() if KINDS[step.kind].trains
    }
    mean = sum(costs.values()) / len(costs) if costs and all(costs.values()) else 0.0
    return {
        fp: KINDS[step.kind].weight * (costs[fp] / mean if mean and fp in costs else 1.0)
        for fp, step in steps.items()
    }
