"""What a service does next: a pure function of its state, the rules of its lane, and the time.

Invariant: whoever reads the same state at the same time finds the same task, so a worker that takes over does what the one before it was
doing. One candidate at a time is in the lane that merges. Candidates follow each other in the order of admission, or in the declared
order of their tasks.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from merge_service.live.state import IN_LINE, Arrival, State

What = Literal["check", "wait", "late", "merge", "evaluate", "watch", "decide", "refold", "make"]

LATE = "order.late"
"""The reason of an arrival whose place in the declared order is passed."""


@dataclass(frozen=True)
class Lane:
    """The rules of the lane. `order` are all tasks in their declared order; none: arrivals are merged in the order of admission.

    With a declared order an arrival waits for the tasks before its own: for ever, or until it has waited `patience_ms`. Up to `batch`
    arrivals are one candidate.
    """

    order: tuple[str, ...] = ()
    patience_ms: int | None = None
    batch: int = 1

    def place(self, task: str) -> int:
        """The place of a task in the declared order; one that is not in it comes after all others."""
        return self.order.index(task) if task in self.order else len(self.order)


@dataclass(frozen=True)
class Task:
    """One thing to do; `arrival` is what it is about, `t` the time step whose weights are to be made."""

    what: What
    arrival: str = ""
    t: int = 0


def next_task(state: State, rules: Lane = Lane(), now_ms: int = 0) -> Task | None:
    """A removal comes first, because until it is done what was taken out is still served; then a rollback that waits for weights,
    a candidate that is begun, new arrivals as far as the next candidate may need them, and the lane. None: there is nothing to do.
    `now_ms` is Unix time in milliseconds.
    """
    if state.removal is not None:
        return Task("refold", state.removal.arrival)
    if state.asked is not None:
        return Task("make", t=state.asked.t)
    lane = [state.arrivals[name] for name in state.index.lane]
    if begun := [one for one in lane if one.status not in IN_LINE]:
        task = _begun(state, min(begun, key=lambda one: one.queued or 0))
        idle = task.what == "watch" and state.index.incoming
        return Task("check", next(iter(state.index.incoming))) if idle else task
    ready = in_turn(state, rules, now_ms)
    new = next(iter(state.index.incoming), None)
    if new is not None and (rules.order or len(ready) < rules.batch):
        return Task("check", new)
    if ready:
        return Task("merge", ready[0].id)
    late = (Task("late", one.id) for one in lane if _is_late(state, rules, one))
    early = (Task("wait", one.id) for one in lane if one.status == "admitted")
    return next(late, None) or next(early, None)


def in_turn(state: State, rules: Lane, now_ms: int) -> list[Arrival]:
    """The arrivals in line that may be merged now, in this order, each after those before it."""
    line = [one for name in state.index.lane if (one := state.arrivals[name]).status in IN_LINE]
    if not rules.order:
        return sorted(line, key=lambda one: one.queued or 0)
    line.sort(key=lambda one: (rules.place(one.task), one.queued or 0))
    skipped = -1  # holes before this place are passed over: whoever waits behind them has waited long enough
    if rules.patience_ms is not None:
        tired = (rules.place(one.task) for one in line if now_ms - one.time_ms >= rules.patience_ms)
        skipped = max(tired, default=-1)
    there, found = {*state.index.tasks}, list[Arrival]()
    for one in line:
        at, allowed = rules.place(one.task), one.replaces is not None or LATE in one.waived
        waits = not allowed and at > skipped and not there.issuperset(rules.order[:at])
        if one.task in there or not (waits or _is_late(state, rules, one)):
            found.append(one)
            there.add(one.task)
    return found


def backlog(state: State) -> dict[str, int]:
    """How many arrivals are on their way, by status."""
    incoming = {"received": len(state.index.incoming)} if state.index.incoming else {}
    return {**incoming, **Counter(state.arrivals[name].status for name in state.index.lane)}


def awaited(state: State, rules: Lane, arrival: Arrival) -> tuple[str, ...]:
    """The tasks before that of an arrival of which no expert is accepted."""
    before = rules.order[: rules.place(arrival.task)]
    return tuple(task for task in before if task not in state.index.tasks)


def _begun(state: State, arrival: Arrival) -> Task:
    whole = all(state.arrivals[name].status in IN_LINE for name in arrival.batch)
    if arrival.on != state.chain or not whole:
        return Task("merge", arrival.id)
    return Task({"merged": "evaluate", "canary": "watch"}.get(arrival.status, "decide"), arrival.id)  # type: ignore[arg-type]


def _is_late(state: State, rules: Lane, arrival: Arrival) -> bool:
    """Whether a later task is accepted already, so that this one can only come at the end, which somebody must allow."""
    if arrival.task in state.index.tasks or arrival.replaces is not None or LATE in arrival.waived:
        return False
    return any(task in state.index.tasks for task in rules.order[rules.place(arrival.task) :])
