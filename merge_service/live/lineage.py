"""Who descends from whom, and what a removal makes necessary: pure questions about a state.

With initialization latest, all or ema a later expert is trained from weights that hold earlier ones. A start ticket says from which
entry of the log its weights are, and so which experts they hold.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from merge_service.live.state import Accepted, Arrival, State
from merge_service.timelines import Strategy

SNAPSHOT_EVERY = 64


@dataclass(frozen=True)
class RemovalPlan:
    """From which snapshot a removal folds again (0: from the base), and which places are read again."""

    snapshot: int
    refolded: tuple[str, ...]


def is_snapshot(t: int) -> bool:
    """Whether the streaming state after `t` experts is kept: t = 1, 2, 4, ... and every multiple of 64."""
    return t > 0 and (t % SNAPSHOT_EVERY == 0 or t & (t - 1) == 0)


def snapshots(t: int) -> tuple[int, ...]:
    """The snapshots at or before `t`."""
    powers = (1 << power for power in range(t.bit_length()))
    return (*(one for one in powers if one % SNAPSHOT_EVERY), *range(SNAPSHOT_EVERY, t + 1, SNAPSHOT_EVERY))


def nearest_snapshot(t: int) -> int:
    """The newest snapshot at or before `t`; 0 if there is none."""
    return max(snapshots(t), default=0)


def removal_plan(places: tuple[Accepted, ...], arrivals: frozenset[str]) -> RemovalPlan:
    """What must be folded again when these arrivals leave the accepted sequence. Raises `LookupError` if none is in it."""
    first = next((at for at, one in enumerate(places) if one.arrival in arrivals), None)
    if first is None:
        raise LookupError("none of them is accepted")
    start = nearest_snapshot(first)
    return RemovalPlan(start, tuple(one.arrival for one in places[start:] if one.arrival not in arrivals))


def held_by_start(state: State, strategy: Strategy, arrival: Arrival) -> tuple[str, ...]:
    """The arrivals whose weights the start of this one held, by its ticket; empty without one."""
    if arrival.init_seq is None or strategy.init == "base":
        return ()
    there = [
        one
        for one in state.arrivals.values()
        if one.accepted_seq is not None
        and one.accepted_seq <= arrival.init_seq
        and (one.left_seq is None or one.left_seq > arrival.init_seq)
    ]
    there.sort(key=lambda one: (_placed(state, one), one.queued or 0))  # a batch was accepted by one entry
    return tuple(one.id for one in (there[-1:] if strategy.init == "latest" else there))


def parents(state: State, strategy: Strategy) -> Mapping[str, tuple[str, ...]]:
    """For every arrival, the arrivals that its start held."""
    return {name: held_by_start(state, strategy, one) for name, one in state.arrivals.items()}


def descendants(state: State, strategy: Strategy, arrival: str) -> tuple[str, ...]:
    """Every arrival that was trained from weights that held this one, at first or second hand, in the order they came."""
    tainted = {arrival}
    for name, start in parents(
        state, strategy
    ).items():  # a start is always older than what was trained from it
        if tainted & set(start):
            tainted.add(name)
    return tuple(name for name in state.arrivals if name in tainted and name != arrival)


def to_retrain(state: State) -> tuple[str, ...]:
    """The arrivals that were removed with an ancestor, to be trained again, as far as no expert of their task was accepted since."""
    newest = dict[str, int]()
    for one in state.arrivals.values():
        newest[one.task] = max(newest.get(one.task, 0), one.accepted_seq or 0)
    return tuple(
        one.id
        for one in state.arrivals.values()
        if one.decided == "retrain"
        and one.reasons[1:]
        and one.accepted_seq
        and newest[one.task] < (one.left_seq or 0)
    )


def ancestors(state: State, strategy: Strategy, arrival: str) -> tuple[str, ...]:
    """Every arrival that the start of this one held, at first or second hand, in the order they came."""
    every, found, waiting = parents(state, strategy), set[str](), [arrival]
    while waiting:
        new = set(every[waiting.pop()]) - found
        found |= new
        waiting += new
    return tuple(name for name in state.arrivals if name in found)


def _placed(state: State, arrival: Arrival) -> int:
    """The entry by which the place of an arrival in the sequence came to be; a replacement takes the place of another."""
    while arrival.place is not None:
        arrival = state.arrivals[arrival.place]
    return arrival.accepted_seq or 0
