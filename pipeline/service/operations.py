"""What people ask of a service: each is decided on the newest state, appended, and answered once it is durable.

Invariant: an operation that was done before is not done again. What needs work (a merge, an evaluation) is done by the worker, which
finds in the log what is asked of it.
"""

from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import NamedTuple

from merge_service.live import (
    Draft,
    Entry,
    Known,
    Received,
    Refused,
    Removed,
    State,
    TokenIssued,
    TokenRevoked,
    promote,
    purge,
    receive,
    reject,
    release,
    remove,
    roll_back,
)
from pipeline.service.home import Home
from pipeline.service.log import Decide
from pipeline.study.mistakes import nearest

DAY_MS = 24 * 3600 * 1000


@dataclass(frozen=True)
class Sender:
    """Who sends an expert, and what is said about it. `init` is base, foreign, or the sha256 of the weights it started from."""

    task: str
    owner: str
    license: str = ""
    note: str = ""
    init: str = "base"
    replaces: str | None = None


@dataclass(frozen=True)
class Quota:
    """How many arrivals a day one owner may have (`owner`), and the token that asks (`token`; None: any number)."""

    owner: int
    token: int | None
    now_ms: int

    def check(self, state: State, data: Received, actor: str) -> None:
        """Raise Refused if one more arrival would be too many."""
        mine, sent = self._counts(state, data, actor)
        if mine >= self.owner:
            raise Refused(
                "limit.owner", f"{data.owner} sent {mine} experts in 24 hours; {self.owner} are allowed"
            )
        if self.token is not None and sent >= self.token:
            raise Refused(
                "limit.token", f"this token sent {sent} experts in 24 hours; {self.token} are allowed"
            )

    def left(self, state: State, data: Received, actor: str) -> int:
        """How many more may come now."""
        mine, sent = self._counts(state, data, actor)
        return max(0, min(self.owner - mine, self.owner if self.token is None else self.token - sent))

    def _counts(self, state: State, data: Received, actor: str) -> tuple[int, int]:
        """Arrivals of 24 hours, of this owner and of this token; counted from the newest on, and no further than is allowed."""
        index = state.index
        return (
            self._today(state, index.by_owner.get(data.owner, ()), self.owner),
            self._today(
                state, index.by_actor.get(actor, ()), self.owner if self.token is None else self.token
            ),
        )

    def _today(self, state: State, names: tuple[str, ...], most: int) -> int:
        times = (state.arrivals[name].time_ms for name in reversed(names))
        return sum(1 for _ in islice(takewhile(lambda time_ms: time_ms > self.now_ms - DAY_MS, times), most))


class Arrived(NamedTuple):
    """The id of an arrival, and whether it is new."""

    id: str
    new: bool


class Operations:
    """The operations of an open service; `actor` is who asks, for the log. With `if_head` nothing is done unless the log still ends at
    the entry with this sha256.
    """

    def __init__(self, home: Home, actor: str = "local", if_head: str | None = None) -> None:
        self.home, self.actor, self.if_head = home, actor, if_head

    def arrive(self, checkpoint: Path, sender: Sender) -> str:
        """Take an expert in; returns the id of its arrival, which is that of the first where it came before. The bytes and the
        arrival are durable then. Raises UserError for what is no checkpoint, is too large, or is refused.
        """
        self.check_task(sender.task)
        home, state = self.home, self.home.log.state
        taken = home.experts.take(
            checkpoint, home.config.admission.max_bytes, lambda: home.models.under(state, sender.init)
        )
        data = Received(
            sender.task, taken.sha256, taken.bytes, sender.init, sender.owner, sender.license, sender.note,
            replaces=sender.replaces, init_seq=self._held_since(sender.init), adapter=taken.adapter,
        )  # fmt: skip
        return self.received(data).id

    def received(self, data: Received, quota: Quota | None = None) -> Arrived:
        """Append an arrival whose bytes are in `incoming`; returns it, or the first of its kind. Raises Refused."""
        known: list[str] = []

        def decide(state: State) -> Draft | None:
            found = receive(state, data, self.actor)
            if isinstance(found, Known):
                known.append(found.arrival)
                return None
            self.check_room(state)
            if quota is not None:
                quota.check(state, data, self.actor)
            return found

        entry = self._append(decide)
        return Arrived(known[-1], False) if entry is None else Arrived(str(entry.arrival), True)

    def check_room(self, state: State) -> None:
        """Raise Refused if as many arrivals wait as may."""
        waiting = state.index.waiting
        if waiting >= self.home.config.limits.waiting:
            raise Refused("limit.waiting", f"{waiting} arrivals wait already; send it again later")

    def release(self, arrival: str, reason: str) -> Entry | None:
        """Let an arrival go on in spite of why it was stopped; a held candidate is promoted by this. Raises Refused."""
        return self._append(lambda state: release(state, arrival, reason, self.actor))

    def promote(self, arrival: str, reason: str) -> Entry | None:
        """Serve what an accepted arrival brought, or let a held one go on. Raises Refused."""
        return self._append(lambda state: promote(state, arrival, reason, self.actor))

    def reject(self, arrival: str, reason: str) -> Entry | None:
        """Refuse a held arrival. Raises Refused."""
        return self._append(lambda state: reject(state, arrival, reason, self.actor))

    def roll_back(self, t: int, reason: str, hold: bool = False) -> Entry | None:
        """Serve time step `t`. Raises Refused."""
        return self._append(lambda state: roll_back(state, t, reason, self.actor, hold))

    def remove(self, arrival: str, data: Removed) -> Entry | None:
        """Take an expert out of all merges, or withdraw it. Raises Refused."""
        strategy = self.home.config.timeline
        return self._append(lambda state: remove(state, strategy, arrival, data, self.actor))

    def purge(self, arrival: str, reason: str) -> Entry | None:
        """Delete the bytes of a removed expert for ever. Raises Refused."""
        strategy = self.home.config.timeline
        return self._append(lambda state: purge(state, strategy, arrival, reason, self.actor))

    def token_issued(self, data: TokenIssued) -> Entry | None:
        """Note that a token is there, and what it may do."""
        return self._append(lambda state: Draft(data, actor=self.actor))

    def token_revoked(self, token: str, reason: str) -> Entry | None:
        """Note that a token is worth nothing any more; nothing for one that the log does not have, or has as revoked."""

        def decide(state: State) -> Draft | None:
            known = state.tokens.get(token)
            return (
                None
                if known is None or known.revoked
                else Draft(TokenRevoked(token, reason), actor=self.actor)
            )

        return self._append(decide)

    def check_task(self, task: str) -> None:
        """Raise Refused for a task that nobody may submit for."""
        taken = self.home.config.taken
        if taken is not None and task not in taken:
            raise Refused(
                "task.unknown", f"task {task}: this service takes {', '.join(taken)}{nearest(task, taken)}"
            )

    def _append(self, decide: Decide) -> Entry | None:
        """Append, on the head that the caller saw. Raises Refused if the log has gone on."""

        def guarded(state: State) -> Draft | None:
            if self.if_head is not None and state.head != self.if_head:
                raise Refused("head.moved", f"the log has gone on: its head is now {state.head}")
            return decide(state)

        return self.home.log.append(guarded)

    def _held_since(self, init: str) -> int | None:
        """The entry since which the weights with this sha256 are what the next expert starts from; None if they never were."""
        state = self.home.log.refresh()
        t = state.index.starts.get(init)
        return None if t is None else state.arrivals[state.sequence[t - 1].arrival].accepted_seq
