"""What a service does next: a pure function of its state.

Invariant: whoever reads the same state finds the same task, so a worker that takes over does what the one before it was doing. One
arrival at a time is in the lane that merges; its order is that of admission.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from merge_service.live.state import Arrival, State

What = Literal["check", "merge", "evaluate", "decide", "refold", "make"]


@dataclass(frozen=True)
class Task:
    """One thing to do; `arrival` is what it is about, `t` the time step whose weights are to be made."""

    what: What
    arrival: str = ""
    t: int = 0


def next_task(state: State) -> Task | None:
    """A removal comes first, because until it is done what was taken out is still served; then a rollback that waits for weights,
    the lane, and new arrivals in the order they came. None: there is nothing to do.
    """
    if state.removal is not None:
        return Task("refold", state.removal.arrival)
    if state.asked is not None:
        return Task("make", t=state.asked.t)
    lane = [state.arrivals[name] for name in state.index.lane]
    if lane:
        return _of_lane(
            state, min(lane, key=lambda one: (one.status in ("admitted", "waiting"), one.queued or 0))
        )
    new = next(iter(state.index.incoming), None)
    return None if new is None else Task("check", new)


def backlog(state: State) -> dict[str, int]:
    """How many arrivals are on their way, by status."""
    incoming = {"received": len(state.index.incoming)} if state.index.incoming else {}
    return {**incoming, **Counter(state.arrivals[name].status for name in state.index.lane)}


def _of_lane(state: State, arrival: Arrival) -> Task:
    if arrival.status in ("admitted", "waiting") or arrival.on != state.chain:
        return Task("merge", arrival.id)
    return Task("evaluate" if arrival.status == "merged" else "decide", arrival.id)
