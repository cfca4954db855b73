"""What people may ask of a service, as entries: checked against the state, refused with the reason.

Each function takes the state as it is and what is asked for, and gives the draft of an entry, or nothing if it is so already. Who may
ask is decided before; whether the state allows it is decided here.
"""

from dataclasses import dataclass, replace
from typing import Literal

from merge_service.errors import UserError
from merge_service.live import entries as kinds
from merge_service.live.entries import Draft
from merge_service.live.lineage import descendants
from merge_service.live.state import GONE, Arrival, State
from merge_service.timelines import Strategy

Descendants = Literal["none", "keep", "remove", "retrain"]
NEVER_WAIVED = ("format.", "door.")
"""Reasons that no release can set aside: such an expert cannot be merged."""


class Refused(UserError):
    """What was asked for is not allowed. `code` is stable, for programs."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


def arrival_called(state: State, arrival: str) -> Arrival:
    """An arrival by its id. Raises `Refused`."""
    found = state.arrivals.get(arrival)
    if found is None:
        raise Refused("arrival.unknown", f"there is no arrival {arrival}")
    return found


@dataclass(frozen=True)
class Known:
    """The request was made before: this is the arrival it led to."""

    arrival: str


def receive(state: State, data: kinds.Received, actor: str) -> Draft | Known:
    """An expert arrives. The same bytes for the same task from the same start are the first arrival again, unless it was taken out.

    Raises `Refused` for bytes that were purged, and for an idempotency key that came with another request.
    """
    if data.key and data.key in state.keys:
        known = state.keys[data.key]
        if known.body != data.body:
            raise Refused(
                "idempotency.reused",
                f"the idempotency key was used for another request, which became {known.arrival}",
            )
        return Known(known.arrival)
    if data.sha256 in state.denied:
        raise Refused(
            "arrival.denied", f"these bytes were purged with {state.denied[data.sha256]} and are refused"
        )
    if data.ticket and data.ticket in state.tickets:
        first = arrival_called(state, state.tickets[data.ticket])
        if first.sha256 != data.sha256:
            raise Refused("ticket.used", f"the start ticket was used by {first.id}; ask for another")
    for one in map(state.arrivals.__getitem__, state.index.by_digest.get(data.sha256, ())):
        if (one.task, one.init) == (data.task, data.init) and one.status not in GONE:
            return Known(one.id)
    if data.replaces is not None and arrival_called(state, data.replaces).status != "accepted":
        raise Refused("arrival.state", f"{data.replaces} is not accepted, so it cannot be replaced")
    return Draft(data, actor=actor)


def release(state: State, arrival: str, reason: str, actor: str) -> Draft:
    """Let a quarantined, held or rejected arrival go on in spite of why it was stopped."""
    one = arrival_called(state, arrival)
    if one.status not in ("quarantined", "held", "rejected"):
        raise Refused(
            "arrival.state",
            f"{arrival} is {state.shown(arrival)}; only a quarantined, held or rejected arrival can be released",
        )
    if never := [reason for reason in one.reasons if reason.startswith(NEVER_WAIVED)]:
        raise Refused("arrival.unfit", f"{arrival} cannot be merged ({never[0]}: {one.detail})")
    return Draft(kinds.Released(reason, one.reasons), arrival, actor)


def reject(state: State, arrival: str, reason: str, actor: str) -> Draft:
    """An operator refuses a held arrival, or a candidate that is a canary."""
    one = arrival_called(state, arrival)
    if one.status not in ("held", "canary") or not one.expert:
        raise Refused(
            "arrival.state",
            f"{arrival} is {state.shown(arrival)}; only a held candidate or a canary can be rejected",
        )
    return Draft(kinds.Rejected(("operator",), reason), arrival, actor)


def promote(state: State, arrival: str, reason: str, actor: str) -> Draft | None:
    """Serve what an accepted arrival brought, which undoes a rollback; or let a held one, or a canary, go on. None if it is served already."""
    one = arrival_called(state, arrival)
    if one.status == "held":
        return release(state, arrival, reason, actor)
    if one.status == "canary":
        return Draft(kinds.CanaryEnded(0, ()), arrival, actor)
    if one.t is None:
        raise Refused(
            "arrival.state",
            f"{arrival} is {state.shown(arrival)}; an accepted arrival, a held one or a canary can be promoted",
        )
    return roll_back(state, one.t, reason, actor)


def roll_back(state: State, t: int, reason: str, actor: str, hold: bool = False) -> Draft | None:
    """Serve time step `t`; None if it is served already, with the same `hold`."""
    if state.removal is not None:
        raise Refused(
            "removal.running", f"the removal of {state.removal.arrival} is under way; ask again after it"
        )
    try:
        version = state.version(t)
    except LookupError as error:
        raise Refused("t.unknown", str(error)) from None
    if (state.served.t, state.on_hold, state.asked) == (t, hold, None):
        return None
    return Draft(kinds.RolledBack(replace(version), hold, reason), None, actor)


def remove(state: State, strategy: Strategy, arrival: str, data: kinds.Removed, actor: str) -> Draft | None:
    """Take an expert out of all merges, or withdraw it; None if that was done before.

    With descendants somebody must decide about them. `data.also` is filled in from `data.descendants`.
    """
    one = arrival_called(state, arrival)
    if one.status in GONE:
        return None
    if one.status != "accepted":
        return Draft(replace(data, also=()), arrival, actor)
    if state.removal is not None:
        raise Refused(
            "removal.running", f"the removal of {state.removal.arrival} is under way; ask again after it"
        )
    below = _below(state, strategy, arrival)
    if below and data.descendants == "none":
        raise Refused(
            "descendants.undecided",
            f"{', '.join(below)} were trained from weights that held {arrival}; decide about them: keep, remove or retrain",
        )
    also = tuple(below) if data.descendants in ("remove", "retrain") else ()
    return Draft(replace(data, also=also), arrival, actor)


def _below(state: State, strategy: Strategy, arrival: str) -> list[str]:
    """The descendants of an arrival that are still there."""
    return [name for name in descendants(state, strategy, arrival) if state.arrivals[name].status not in GONE]


def purge(state: State, strategy: Strategy, arrival: str, reason: str, actor: str) -> Draft | None:
    """Delete the bytes of a removed arrival and refuse them from now on; None if that was done before."""
    one = arrival_called(state, arrival)
    if one.status == "purged":
        return None
    if one.status not in ("removed", "withdrawn", "quarantined", "rejected", "held"):
        raise Refused("arrival.state", f"{arrival} is {state.shown(arrival)}; remove it first")
    if state.removal is not None:
        raise Refused(
            "removal.running", f"the removal of {state.removal.arrival} is under way; purge after it"
        )
    below = _below(state, strategy, arrival)
    if below and one.decided in ("", "none"):
        raise Refused(
            "descendants.undecided", f"{', '.join(below)} were trained from weights that held {arrival}"
        )
    return Draft(kinds.Purged(one.sha256, reason), arrival, actor)
