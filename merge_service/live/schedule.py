"""What a service does next: a pure function of its state.

Invariant: whoever reads the same state finds the same task, so a worker that takes over does what the one before it was doing. One
arrival at a time is in the lane that merges; its order is that of admission.
"""

from dataclasses import dataclass
from typing import Literal

from merge_service.live.state import QUEUED, Arrival, State

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
    lane = [one for one in state.arrivals.values() if one.status in QUEUED]
    if lane:
        return _of_lane(
            state, min(lane, key=lambda one: (one.status in ("admitted", "waiting"), one.queued or 0))
        )
    new = next((one for one in state.arrivals.values() if one.status == "received"), None)
    return None if new is None else Task("check", new.id)


def backlog(state: State) -> dict[str, int]:
    """How many arrivals are on their way, by status."""
    found: dict[str, int] = {}
    for one in state.arrivals.values():
        if not one.is_final:
            found[one.status] = found.get(one.status, 0) + 1
    return found


def _of_lane(state: State, arrival: Arrival) -> Task:
    if arrival.status in ("admitted", "waiting") or arrival.on != state.chain:
        return Task("merge", arrival.id)
    return Task("evaluate" if arrival.status == "merged" else "decide", arrival.id)
