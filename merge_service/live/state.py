"""The state of a service: everything that its log says, as immutable values.

Invariant: `state = reduce(apply, entries, State())`. Nothing else makes or changes one, so equal logs have equal states, wherever and
however often they are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, get_args

from merge_service.live.entries import GENESIS, Scored, Verdict, Version
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


@dataclass(frozen=True)
class Arrival:
    """One expert that came, sent by `actor` (a token's id, or `local`). `expert` names its artifact once it is admitted. `queued` is the
    entry by which it got its place in the lane. `accepted_seq` and `left_seq` are the entries by which it came into the accepted
    sequence and left it.
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
class State:
    """The whole service after entry `seq`, whose sha256 is `head`.

    `sequence` holds the accepted experts in order; place i is time step i + 1. `config` is as it was set last. `denied` maps digests
    that are refused to the arrival that brought them. `tickets` maps start tickets to the arrival they came back with.
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
        return next((one for one in self.arrivals.values() if one.status in ("evaluated", "canary")), None)

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


def linked(root: str, places: tuple[Accepted, ...]) -> tuple[str, ...]:
    """The chain after each place."""
    return tuple(accumulate((one.sha256 for one in places), link, initial=root))[1:]


def link(chain: str, sha256: str) -> str:
    """The chain of a sequence and one more expert."""
    return digest([chain, sha256])
