"""What each entry does to the state: the machine of arrivals, the accepted sequence, and what is served.

Invariant: `apply` is a pure function. An entry that the state does not allow is a `BrokenLog` that names it, so no such entry is ever
written, and a log that holds one was not written by this service.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from functools import reduce
from typing import Any

from merge_service.live import entries as kinds
from merge_service.live.entries import BrokenLog, Entry, Version
from merge_service.live.state import (
    IN_LINE,
    QUEUED,
    Accepted,
    Arrival,
    Asked,
    Key,
    Removal,
    Served,
    State,
    Status,
    Token,
    link,
    linked,
)


def apply(state: State, entry: Entry) -> State:
    """The state after one more entry. Raises `BrokenLog` if it does not follow, or is not allowed."""
    if (entry.seq, entry.prev) != (state.seq + 1, state.head):
        raise BrokenLog(f"log entry {entry.seq} does not follow entry {state.seq}")
    if (entry.seq == 1) != isinstance(entry.data, kinds.ServiceStarted):
        raise BrokenLog(f"log entry {entry.seq}: a log begins with service_started, and has no other")
    after = _RULES[type(entry.data)](state, entry, entry.data)
    return replace(after, seq=entry.seq, head=entry.sha256)


def fold(entries: Iterable[Entry], state: State = State()) -> State:
    """The state after all entries. Raises `BrokenLog`."""
    return reduce(apply, entries, state)


def _refuse(entry: Entry, why: str) -> BrokenLog:
    return BrokenLog(f"log entry {entry.seq} ({entry.kind}): {why}")


def _the(state: State, entry: Entry, *allowed: str) -> Arrival:
    """The arrival of an entry, in one of these states."""
    found = state.arrivals.get(entry.arrival or "")
    if found is None:
        raise _refuse(entry, f"there is no arrival {entry.arrival}")
    if found.status not in allowed:
        raise _refuse(
            entry, f"{found.id} is {state.shown(found.id)}; this needs one that is {' or '.join(allowed)}"
        )
    return found


def _put(state: State, arrival: Arrival, **changes: Any) -> State:
    return _with(state, replace(arrival, **changes))


def _with(state: State, *arrivals: Arrival) -> State:
    """The same with these arrivals as they are now."""
    every, index = {**state.arrivals, **{one.id: one for one in arrivals}}, state.index
    for one in arrivals:
        index = index.put(one, every)
    return replace(state, arrivals=every, index=index)


def _sequenced(state: State, sequence: tuple[Accepted, ...]) -> State:
    """The same with this accepted sequence."""
    return replace(state, sequence=sequence, index=state.index.follow(state.sequence, sequence))


def _started(state: State, entry: Entry, data: kinds.ServiceStarted) -> State:
    served = Served(0, data.base.fingerprint, data.base.sha256)
    return replace(state, name=data.name, base=data.base, strategy=dict(data.strategy), served=served)


def _config(state: State, entry: Entry, data: kinds.ConfigSet) -> State:
    return replace(state, config=dict(data.config))


def _uploaded(state: State, entry: Entry, data: kinds.UploadCompleted) -> State:
    return replace(state, uploads={**state.uploads, data.upload: dict(data.files)})


def _received(state: State, entry: Entry, data: kinds.Received) -> State:
    if data.sha256 in state.denied:
        raise _refuse(
            entry, f"these bytes were purged with {state.denied[data.sha256]} and are refused for ever"
        )
    if data.key in state.keys and data.key:
        raise _refuse(entry, f"the idempotency key was used by {state.keys[data.key].arrival}")
    if data.replaces is not None and data.replaces not in {one.arrival for one in state.sequence}:
        raise _refuse(entry, f"{data.replaces} is not accepted, so it cannot be replaced")
    named = {one.name for one in fields(data)} - {"key", "body"}
    arrival = Arrival(
        id=entry.arrival or "",
        seq=entry.seq,
        time_ms=entry.time_ms,
        actor=entry.actor,
        **{name: getattr(data, name) for name in named},
    )
    keys = {**state.keys, data.key: Key(arrival.id, data.body, entry.time_ms)} if data.key else state.keys
    tickets = {**state.tickets, data.ticket: arrival.id} if data.ticket else state.tickets
    return replace(_with(state, arrival), keys=keys, tickets=tickets)


def _admitted(state: State, entry: Entry, data: kinds.Admitted) -> State:
    return _put(
        state, _the(state, entry, "received"),
        status="admitted", expert=data.expert, figures=dict(data.figures), verdicts=data.solo, own=dict(data.own),
        queued=entry.seq, reasons=(), detail="",
    )  # fmt: skip


def _quarantined(state: State, entry: Entry, data: kinds.Quarantined) -> State:
    return _put(
        state, _the(state, entry, "received"),
        status="quarantined", reasons=data.reasons, detail=data.detail, figures=dict(data.figures),
    )  # fmt: skip


def _waiting(state: State, entry: Entry, data: kinds.Waiting) -> State:
    return _put(state, _the(state, entry, "admitted"), status="waiting", reasons=(data.reason,))


def _batched(state: State, entry: Entry, data: kinds.Batched) -> State:
    arrival = _the(state, entry, *QUEUED)
    if arrival.id in data.also or len(set(data.also)) < len(data.also):
        raise _refuse(entry, "an arrival is in a batch once")
    for name in data.also:
        if name not in state.arrivals or state.arrivals[name].status not in IN_LINE:
            raise _refuse(entry, f"{name} does not wait to be merged")
    return _put(
        state, arrival, status="admitted", batch=data.also, candidate=None, on="", place=None, scored=None
    )


def _halved(state: State, entry: Entry, data: kinds.Halved) -> State:
    arrival = _the(state, entry, "evaluated", "canary")
    if not 1 <= data.most <= len(arrival.batch):
        raise _refuse(entry, f"a batch of {len(arrival.batch) + 1} cannot be halved to {data.most}")
    alone = tuple(one for one in arrival.verdicts if one.gate.startswith("solo"))
    first = replace(
        arrival,
        status="admitted",
        batch=(),
        most=data.most,
        candidate=None,
        on="",
        scored=None,
        verdicts=alone,
    )
    also = (replace(state.arrivals[name], most=data.most) for name in arrival.batch)
    return _with(state, first, *also)


def _merged(state: State, entry: Entry, data: kinds.Merged) -> State:
    arrival = _the(state, entry, *QUEUED)
    if arrival.batch and data.place is not None:
        raise _refuse(entry, "what takes the place of another is in no batch")
    if data.on != state.chain:
        raise _refuse(entry, "the candidate was built on a state that is not the accepted one any more")
    if data.place is not None and data.place not in {one.arrival for one in state.sequence}:
        raise _refuse(entry, f"{data.place} has no place in the accepted sequence")
    return _put(
        state,
        arrival,
        status="merged",
        candidate=data.candidate,
        on=data.on,
        place=data.place,
        scored=None,
        trial=None,
        tried=None,
    )


def _evaluated(state: State, entry: Entry, data: kinds.Evaluated) -> State:
    arrival = _the(state, entry, "merged")
    solo = tuple(one for one in arrival.verdicts if one.gate.startswith("solo"))
    return _put(state, arrival, status="evaluated", scored=data.scored, verdicts=(*solo, *data.verdicts))


def _canary(state: State, entry: Entry, data: kinds.CanaryStarted) -> State:
    return _put(state, _the(state, entry, "evaluated"), status="canary", trial=data, tried=entry.seq)


def _canary_ended(state: State, entry: Entry, data: kinds.CanaryEnded) -> State:
    arrival = _the(state, entry, "canary")
    return _put(state, arrival, status="evaluated", verdicts=(*arrival.verdicts, *data.verdicts))


def _promoted(state: State, entry: Entry, data: kinds.Promoted) -> State:
    if data.refold:
        return _refolded(state, entry, data)
    arrival = _candidate(state, entry, data.version)
    if arrival.place is not None:
        raise _refuse(entry, f"the candidate stands in the place of {arrival.place}; that is a replacement")
    after, places, chain = state, list(state.sequence), state.chain
    judged = tuple(one for one in arrival.verdicts if not one.gate.startswith("solo"))
    for name in (arrival.id, *arrival.batch):
        one, chain = state.arrivals[name], link(chain, state.arrivals[name].sha256)
        last, t = name == (arrival.id, *arrival.batch)[-1], len(places) + 1
        version, scored = (data.version, data.scored) if last else (Version(t, "", ""), None)
        places.append(Accepted(one.id, one.task, one.expert, one.sha256, chain, version, scored))
        verdicts = one.verdicts if one is arrival else (*one.verdicts, *judged)
        after = _put(
            after, one, status="accepted", t=t, accepted_seq=entry.seq, reasons=(), verdicts=verdicts
        )
    return _serve(_sequenced(after, tuple(places)), data.version)


def _replaced(state: State, entry: Entry, data: kinds.Replaced) -> State:
    arrival = _candidate(state, entry, data.version)
    at = next((at for at, one in enumerate(state.sequence) if one.arrival == data.old), None)
    if at is None or arrival.place != data.old:
        raise _refuse(entry, f"the candidate does not stand in the place of {data.old}")
    new = Accepted(arrival.id, arrival.task, arrival.expert, arrival.sha256, "", data.version)
    places = _renewed(
        state, (*state.sequence[:at], new, *state.sequence[at + 1 :]), at, data.version, data.scored
    )
    after = _put(state, arrival, status="accepted", t=at + 1, accepted_seq=entry.seq, reasons=())
    after = _put(
        after, state.arrivals[data.old],
        status="removed", left_seq=entry.seq, t=None, reasons=(f"replaced.{arrival.id}",), decided="keep",
    )  # fmt: skip
    return _serve(_sequenced(after, places), data.version)


def _candidate(state: State, entry: Entry, version: Version) -> Arrival:
    """The arrival whose candidate is accepted, if it was built on what is accepted now."""
    arrival = _the(state, entry, "evaluated", "canary")
    if state.removal is not None or arrival.on != state.chain:
        raise _refuse(entry, "the accepted state has changed since the candidate was built")
    if arrival.candidate != version:
        raise _refuse(entry, "the version is not that of the candidate")
    if gone := [name for name in arrival.batch if state.arrivals[name].status not in IN_LINE]:
        raise _refuse(entry, f"{gone[0]} is {state.shown(gone[0])}, and the candidate holds it")
    return arrival


def _renewed(
    state: State, places: tuple[Accepted, ...], first: int, version: Version, scored: kinds.Scored | None
) -> tuple[Accepted, ...]:
    """Places of which those from `first` on have other experts before or in them: only the newest version is known."""
    chains, found = linked(state.root, places), list[Accepted]()
    for at, (one, chain) in enumerate(zip(places, chains)):
        if at >= first:
            last = at == len(places) - 1
            made = version if last else Version(at + 1, "", "")
            one = replace(one, chain=chain, version=made, scored=scored if last else None)
        found.append(one)
    return tuple(found)


def _serve(state: State, version: Version) -> State:
    brought = state.sequence[version.t - 1].arrival if version.t else None
    served = Served(version.t, version.fingerprint, version.sha256, brought)
    return replace(state, served=served, asked=None)


def _held(state: State, entry: Entry, data: kinds.Held) -> State:
    arrival = _the(state, entry, "received", *IN_LINE, "evaluated", "canary")
    figures = dict(data.figures) or arrival.figures
    return _put(state, arrival, status="held", reasons=data.reasons, detail=data.detail, figures=figures)


def _rejected(state: State, entry: Entry, data: kinds.Rejected) -> State:
    if state.removal is not None and entry.arrival == state.removal.arrival:
        return _restored(state, data)
    arrival = _the(state, entry, *QUEUED, "held")
    return _put(state, arrival, status="rejected", reasons=data.reasons, detail=data.detail)


def _rolled_back(state: State, entry: Entry, data: kinds.RolledBack) -> State:
    if not 0 <= data.version.t <= state.t:
        raise _refuse(entry, f"there is no t = {data.version.t}; {state.t} experts are accepted")
    if state.removal is not None:
        raise _refuse(entry, "a removal is under way; what is served is decided when it is done")
    if not data.version.fingerprint:
        return replace(state, asked=Asked(data.version.t, data.hold, data.reason))
    after = _known(state, entry, data.version)
    return replace(_serve(after, data.version), on_hold=data.hold)


def _removed(state: State, entry: Entry, data: kinds.Removed) -> State:
    arrival = _the(state, entry, "accepted", "received", "held", "quarantined", "rejected", *QUEUED)
    if arrival.status != "accepted":
        return _put(state, arrival, status="withdrawn", reasons=("withdrawn",), detail=data.reason)
    if state.removal is not None:
        raise _refuse(entry, f"the removal of {state.removal.arrival} is under way")
    leaving = (arrival.id, *data.also)
    if strangers := [one for one in data.also if one not in state.arrivals]:
        raise _refuse(entry, f"there is no arrival {strangers[0]}")
    gone = [at for at, one in enumerate(state.sequence) if one.arrival in leaving]
    stay = tuple(one for one in state.sequence if one.arrival not in leaving)
    prior = tuple(state.arrivals[name] for name in leaving)
    removal = Removal(arrival.id, leaving, gone[0], data.force, state.sequence, prior)
    after = state
    for name in leaving:
        one = state.arrivals[name]
        status: Status = "removed" if one.status == "accepted" else "withdrawn"
        if one.status not in ("removed", "purged"):
            after = _put(
                after, one, status=status, left_seq=entry.seq, t=None, reasons=_why(arrival, one), detail=data.reason,
                decided=data.descendants,
            )  # fmt: skip
    places = _renewed(state, stay, gone[0], Version(len(stay), "", ""), None)
    after = replace(_sequenced(after, places), removal=removal, asked=None)
    return _numbered(after)


def _why(removed: Arrival, one: Arrival) -> tuple[str, ...]:
    """The reasons of an arrival that leaves: it was asked for, or descends from the one that was."""
    return ("removed",) if one is removed else ("removed", f"descends_from.{removed.id}")


def _refolded(state: State, entry: Entry, data: kinds.Promoted) -> State:
    """The end of a removal: the newest version without what was removed is there, and the one to serve."""
    removal = state.removal
    if removal is None or data.version.t != state.t or entry.arrival != removal.arrival:
        raise _refuse(entry, "no removal is under way that this would complete")
    served = data.served or data.version
    if served.t != served_after(state):
        raise _refuse(entry, f"after this removal t = {served_after(state)} is served, not {served.t}")
    after = replace(state, removal=None)
    for version, scored in ((data.version, data.scored), (served, None)):
        after = _known(after, entry, version, scored)
    return _serve(after, served)


def served_after(state: State) -> int:
    """The time step that is served once the removal under way is done: the same experts as now, without those that leave."""
    removal = state.removal
    if removal is None:
        return state.served.t
    before = removal.before[: state.served.t]
    return len(before) - sum(one.arrival in removal.arrivals for one in before)


def _known(state: State, entry: Entry, version: Version, scored: kinds.Scored | None = None) -> State:
    """The same with a version filled in where none was known."""
    known = state.version(version.t)
    if known == version:
        return state
    if known.fingerprint:
        raise _refuse(entry, f"t = {version.t} is {known.sha256}, not {version.sha256}")
    at, places = version.t - 1, state.sequence
    found = replace(places[at], version=version, scored=scored or places[at].scored)
    return _sequenced(state, (*places[:at], found, *places[at + 1 :]))


def _restored(state: State, data: kinds.Rejected) -> State:
    """The end of a removal that a gate refused: everything is as it was before."""
    removal = state.removal
    assert removal is not None
    prior = (replace(one, reasons=data.reasons, detail=data.detail) for one in removal.prior)
    after = replace(_sequenced(_with(state, *prior), removal.before), removal=None)
    return _numbered(after)


def _numbered(state: State) -> State:
    """The same with t of accepted arrivals as their places are now."""
    places = (replace(state.arrivals[one.arrival], t=at) for at, one in enumerate(state.sequence, 1))
    return _with(state, *places)


def _purged(state: State, entry: Entry, data: kinds.Purged) -> State:
    arrival = _the(state, entry, "removed", "withdrawn", "quarantined", "rejected", "held")
    if state.removal is not None:
        raise _refuse(entry, "a removal is under way; purge when it is done")
    if data.sha256 != arrival.sha256:
        raise _refuse(entry, f"{arrival.id} has the digest {arrival.sha256}")
    users = [
        one.id
        for one in map(state.arrivals.__getitem__, state.index.by_digest[arrival.sha256])
        if one.id != arrival.id and one.status in QUEUED | {"accepted", "received"}
    ]
    if users:
        raise _refuse(entry, f"{users[0]} has the same bytes and is {state.shown(users[0])}; remove it first")
    after = _put(state, arrival, status="purged", detail=data.reason)
    return replace(after, denied={**state.denied, arrival.sha256: arrival.id})


def _released(state: State, entry: Entry, data: kinds.Released) -> State:
    arrival = _the(state, entry, "quarantined", "held", "rejected")
    waived = tuple(dict.fromkeys((*arrival.waived, *data.waived)))
    if not arrival.expert:
        return _put(state, arrival, status="received", waived=waived)
    return _put(
        state,
        arrival,
        status="admitted",
        waived=waived,
        queued=entry.seq,
        candidate=None,
        on="",
        place=None,
        batch=(),
    )


def _token(state: State, entry: Entry, data: kinds.TokenIssued) -> State:
    if data.token in state.tokens:
        raise _refuse(entry, f"there is a token {data.token} already")
    token = Token(
        data.token, data.role, data.digest, data.expires_ms, data.owners, data.tasks, data.per_day, data.label
    )
    return replace(state, tokens={**state.tokens, data.token: token})


def _revoked(state: State, entry: Entry, data: kinds.TokenRevoked) -> State:
    if data.token not in state.tokens:
        raise _refuse(entry, f"there is no token {data.token}")
    return replace(
        state, tokens={**state.tokens, data.token: replace(state.tokens[data.token], revoked=True)}
    )


def _noted(state: State, entry: Entry, data: kinds.Note) -> State:
    return state


_RULES: Mapping[type, Callable[[State, Entry, Any], State]] = {
    kinds.ServiceStarted: _started, kinds.ConfigSet: _config, kinds.UploadCompleted: _uploaded,
    kinds.Received: _received, kinds.Admitted: _admitted, kinds.Quarantined: _quarantined, kinds.Waiting: _waiting,
    kinds.Batched: _batched, kinds.Halved: _halved,
    kinds.Merged: _merged, kinds.Evaluated: _evaluated, kinds.CanaryStarted: _canary, kinds.CanaryEnded: _canary_ended, kinds.Promoted: _promoted,
    kinds.Held: _held, kinds.Rejected: _rejected, kinds.RolledBack: _rolled_back, kinds.Removed: _removed,
    kinds.Replaced: _replaced, kinds.Purged: _purged, kinds.Released: _released, kinds.TokenIssued: _token,
    kinds.TokenRevoked: _revoked, kinds.Note: _noted,
}  # fmt: skip
