"""The state of a service: everything that its log says, as immutable values.

Invariant: `state = reduce(apply, entries, State())`. Nothing else makes or changes one, so equal logs have equal states, wherever and
however often they are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal, get_args

from merge_service.live.entries import GENESIS, CanaryStarted, Scored, Verdict, Version
from merge_service.live.values import digest

NO_BASE = Version(0, "", "")
Status = Literal[
    "received", "admitted", "waiting", "merged", "evaluated", "canary", "accepted", "held", "quarantined", "rejected", "withdrawn",
    "removed", "purged",
]  # fmt: skip
Shown = Literal["promoted", "superseded", "rolled_back"]
"""What an accepted arrival is called besides: by where it stands to what is served."""
STATUSES: tuple[str, ...] = get_args(Status)
FINAL = frozenset({"accepted", "held", "quarantined", "rejected", "withdrawn", "removed", "purged"})
"""Where the service has nothing left to do until somebody asks."""
GONE = frozenset({"withdrawn", "removed", "purged"})
"""Taken back, before it was accepted or after."""
QUEUED = frozenset({"admitted", "waiting", "merged", "evaluated", "canary"})
"""In the lane that merges, one at a time."""
IN_LINE = frozenset({"admitted", "waiting"})
"""Of these, those whose candidate is not begun."""
THERE = QUEUED | {"accepted", "held"}
"""Of whose weights another expert may be a copy."""


@dataclass(frozen=True)
class Arrival:
    """One expert that came, sent by `actor` (a token's id, or `local`). `expert` names its artifact once it is admitted. `queued` is the
    entry by which it got its place in the lane. `batch` are the arrivals that its candidate holds after it, and it is in none of more than
    `most`. `trial` is that of its candidate on real requests, begun by entry `tried`. `accepted_seq` and `left_seq` are the entries by which it came into the accepted sequence and left it.
    """

    id: str
    seq: int
    task: str
    sha256: str
    bytes: int
    init: str
    owner: str
    time_ms: int
    actor: str = ""
    status: Status = "received"
    init_seq: int | None = None
    ticket: str = ""
    license: str = ""
    note: str = ""
    origin: str = "local"
    signature: str = ""
    replaces: str | None = None
    adapter: str = ""
    reasons: tuple[str, ...] = ()
    detail: str = ""
    waived: tuple[str, ...] = ()
    expert: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    own: Mapping[str, float] = field(default_factory=dict)
    verdicts: tuple[Verdict, ...] = ()
    scored: Scored | None = None
    candidate: Version | None = None
    on: str = ""
    place: str | None = None
    batch: tuple[str, ...] = ()
    most: int | None = None
    trial: CanaryStarted | None = None
    tried: int | None = None
    queued: int | None = None
    t: int | None = None
    accepted_seq: int | None = None
    left_seq: int | None = None
    decided: str = ""

    @property
    def is_final(self) -> bool:
        """Whether the service has nothing left to do with it."""
        return self.status in FINAL


@dataclass(frozen=True)
class Accepted:
    """One place of the accepted sequence: `expert` and `sha256` of what came, `chain` of all up to here, and what is deployed then."""

    arrival: str
    task: str
    expert: str
    sha256: str
    chain: str
    version: Version
    scored: Scored | None = None


@dataclass(frozen=True)
class Served:
    """What is served: the version, and the arrival that brought it (None: the base)."""

    t: int
    fingerprint: str
    sha256: str
    arrival: str | None = None

    @property
    def version(self) -> Version:
        """The version without the arrival."""
        return Version(self.t, self.fingerprint, self.sha256)


@dataclass(frozen=True)
class Removal:
    """A removal under way: what leaves, from which place on merges change, and the accepted sequence and arrivals before it."""

    arrival: str
    arrivals: tuple[str, ...]
    first: int
    force: bool
    before: tuple[Accepted, ...]
    prior: tuple[Arrival, ...]


@dataclass(frozen=True)
class Asked:
    """A rollback to a time step whose weights must be made first."""

    t: int
    hold: bool
    reason: str


@dataclass(frozen=True)
class Key:
    """What an idempotency key stood for."""

    arrival: str
    body: str
    time_ms: int


@dataclass(frozen=True)
class Token:
    """An issued token; `digest` is the sha256 of its secret."""

    id: str
    role: str
    digest: str
    expires_ms: int
    owners: tuple[str, ...]
    tasks: tuple[str, ...]
    per_day: int | None
    label: str
    revoked: bool = False


@dataclass(frozen=True)
class Index:
    """Arrivals by what is asked of them, so that no question is put to every arrival that ever came.

    `incoming` are those that are not checked yet, in the order they came, `lane` those that are being merged, and `there` those whose
    weights are in a merge, in the lane or held: each maps ids to sha256. `by_digest` gives the arrivals that brought the same bytes,
    `by_owner` and `by_actor` those of one owner and of one sender, in the order they came up to entry `last`. `starts` gives the first
    time step that is deployed with these bytes, `tasks` the first arrival of each accepted task.
    """

    incoming: Mapping[str, str] = field(default_factory=dict)
    lane: Mapping[str, str] = field(default_factory=dict)
    there: Mapping[str, str] = field(default_factory=dict)
    by_digest: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by_owner: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by_actor: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    last: int = 0
    starts: Mapping[str, int] = field(default_factory=dict)
    tasks: Mapping[str, str] = field(default_factory=dict)

    @property
    def waiting(self) -> int:
        """How many arrivals are on their way."""
        return len(self.incoming) + len(self.lane)

    def put(self, one: Arrival, arrivals: Mapping[str, Arrival]) -> "Index":
        """The index when `one` is as it is now; `arrivals` are all of them."""
        incoming = _moved(self.incoming, one, one.status == "received")
        if len(incoming) > len(self.incoming) and self.incoming:
            last = arrivals[next(reversed(dict(self.incoming)))]
            if one.seq < last.seq:  # released: it came before others that wait
                incoming = dict(sorted(incoming.items(), key=lambda item: arrivals[item[0]].seq))
        same = self.by_digest.get(one.sha256, ())
        by_digest = self.by_digest if one.id in same else {**self.by_digest, one.sha256: (*same, one.id)}
        lane = _moved(self.lane, one, one.status in QUEUED)
        there = _moved(self.there, one, bool(one.expert) and one.status in THERE)
        after = replace(self, incoming=incoming, lane=lane, there=there, by_digest=by_digest)
        if one.seq <= self.last:
            return after
        owner, actor = _more(self.by_owner, one.owner, one.id), _more(self.by_actor, one.actor, one.id)
        return replace(after, by_owner=owner, by_actor=actor, last=one.seq)

    def follow(self, before: tuple[Accepted, ...], after: tuple[Accepted, ...]) -> "Index":
        """The index when the accepted sequence is `after`, which was `before`."""
        if after[: len(before)] == before:
            starts, tasks, first = dict(self.starts), dict(self.tasks), len(before)
        else:
            starts, tasks, first = {}, {}, 0
        for at in range(first, len(after)):
            tasks.setdefault(after[at].task, after[at].arrival)
            if after[at].version.sha256:
                starts.setdefault(after[at].version.sha256, at + 1)
        return replace(self, starts=starts, tasks=tasks)


def _more(kept: Mapping[str, tuple[str, ...]], key: str, name: str) -> Mapping[str, tuple[str, ...]]:
    """The same with one more name of a key."""
    return {**kept, key: (*kept.get(key, ()), name)}


def _moved(kept: Mapping[str, str], one: Arrival, belongs: bool) -> Mapping[str, str]:
    """The same ids with this one, or without it."""
    if (one.id in kept) == belongs:
        return kept
    if belongs:
        return {**kept, one.id: one.sha256}
    left = dict(kept)
    del left[one.id]
    return left


@dataclass(frozen=True)
class State:
    """The whole service after entry `seq`, whose sha256 is `head`.

    `sequence` holds the accepted experts in order; place i is time step i + 1. `config` is as it was set last. `denied` maps digests
    that are refused to the arrival that brought them. `tickets` maps start tickets to the arrival they came back with. `index` follows from
    the rest (`indexed`).
    """

    seq: int = 0
    head: str = GENESIS
    name: str = ""
    base: Version = NO_BASE
    strategy: Mapping[str, object] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
    arrivals: Mapping[str, Arrival] = field(default_factory=dict)
    sequence: tuple[Accepted, ...] = ()
    served: Served = Served(0, "", "")
    on_hold: bool = False
    removal: Removal | None = None
    asked: Asked | None = None
    denied: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, Key] = field(default_factory=dict)
    tickets: Mapping[str, str] = field(default_factory=dict)
    tokens: Mapping[str, Token] = field(default_factory=dict)
    uploads: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    index: Index = field(default_factory=Index)

    @property
    def t(self) -> int:
        """How many experts are accepted."""
        return len(self.sequence)

    @property
    def chain(self) -> str:
        """The name of the accepted sequence: equal for equal experts in equal order under one strategy and base."""
        return self.sequence[-1].chain if self.sequence else self.root

    @property
    def root(self) -> str:
        """The name of the empty sequence."""
        return digest([self.base.sha256, dict(self.strategy)])

    @property
    def champion(self) -> Version:
        """The newest accepted version; the base before the first."""
        return self.sequence[-1].version if self.sequence else self.base

    @property
    def challenger(self) -> Arrival | None:
        """The arrival whose candidate is being judged."""
        lane = (self.arrivals[name] for name in self.index.lane)
        return next((one for one in lane if one.status in ("evaluated", "canary")), None)

    def version(self, t: int) -> Version:
        """What is deployed after `t` accepted experts. Raises `LookupError`."""
        if not 0 <= t <= self.t:
            raise LookupError(f"there is no t = {t}; {self.t} experts are accepted")
        return self.sequence[t - 1].version if t else self.base

    def shown(self, arrival: str) -> str:
        """The status of an arrival as people see it."""
        one = self.arrivals[arrival]
        if one.status != "accepted" or one.t is None:
            return one.status
        if one.t == self.served.t:
            return "promoted"
        return "superseded" if one.t < self.served.t else "rolled_back"


def indexed(state: State) -> State:
    """The same with its arrivals in the order they came, and their index made from nothing."""
    arrivals = dict(sorted(state.arrivals.items(), key=lambda item: item[1].seq))
    index = Index().follow((), state.sequence)
    for one in arrivals.values():
        index = index.put(one, arrivals)
    return replace(state, arrivals=arrivals, index=index)


def linked(root: str, places: tuple[Accepted, ...]) -> tuple[str, ...]:
    """The chain after each place."""
    return tuple(accumulate((one.sha256 for one in places), link, initial=root))[1:]


def link(chain: str, sha256: str) -> str:
    """The chain of a sequence and one more expert."""
    return digest([chain, sha256])
