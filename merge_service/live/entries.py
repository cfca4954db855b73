"""The entries of a service's log: one class of data for each kind, and the chain that holds them together.

Everything that a service is follows from its entries, so they name results by fingerprint and sha256, and hold no weights, no secrets
and no addresses of clients.

Invariant: an entry has one text, its sha256 is that of its text without it, and `prev` is the sha256 of the entry before. So an entry
that was altered, removed or moved is found, and named.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from merge_service.errors import UserError
from merge_service.live.values import LATER, canonical, digest, of_plain, plain

GENESIS = "0" * 64
"""`prev` of the first entry."""
DIGITS = 12
"""Digits of a sequence number in names of files."""


class BrokenLog(UserError):
    """The log is not the chain of entries that was written. The message names the entry."""


@dataclass(frozen=True)
class Version:
    """What is deployed after `t` accepted experts: `fingerprint` names the artifact, `sha256` its weights.

    Both are empty for a time step that a removal changed and that nobody has asked for since.
    """

    t: int
    fingerprint: str
    sha256: str


@dataclass(frozen=True)
class Verdict:
    """What one gate found: a difference with its interval, and the margin that it was held against."""

    gate: str
    verdict: Literal["pass", "fail", "undecided"]
    difference: float
    low: float
    high: float
    margin: float


@dataclass(frozen=True)
class Scored:
    """The scores of a candidate, by dataset, in [0, 1]; `evaluation` names the artifact with the answer to every sample."""

    evaluation: str
    scores: Mapping[str, float]
    mean: float | None
    ka: float | None
    zs: float | None
    gm: float | None


@dataclass(frozen=True)
class ServiceStarted:
    """What a service is for its whole life. `strategy` and `base` can never change; another service can replay the experts."""

    name: str
    base: Version
    strategy: Mapping[str, object]
    format: int


@dataclass(frozen=True)
class ConfigSet:
    """The configuration from here on."""

    config: Mapping[str, object]


@dataclass(frozen=True)
class UploadCompleted:
    """All parts of an upload are there: sha256 by file name."""

    upload: str
    files: Mapping[str, str]
    bytes: int


@dataclass(frozen=True)
class Received:
    """An expert has come. `init` is the sha256 of the weights that training started from, `base`, or `foreign`; `init_seq` the entry
    that a start ticket stood for. `key` is the idempotency key and `body` the digest of the request. `adapter` is the sha256 of the
    adapter's weights where the expert was made of one, on `init`.
    """

    task: str
    sha256: str
    bytes: int
    init: str
    owner: str
    license: str = ""
    note: str = ""
    origin: Literal["upload", "uri", "actor", "local"] = "local"
    signature: str = ""
    ticket: str = ""
    init_seq: int | None = None
    key: str = ""
    body: str = ""
    replaces: str | None = None
    adapter: str = field(default="", metadata=LATER)


@dataclass(frozen=True)
class Admitted:
    """The expert alone is fit to be merged. `expert` names its artifact, `figures` are norms and the like."""

    expert: str
    figures: Mapping[str, float]
    solo: tuple[Verdict, ...] = ()
    own: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Quarantined:
    """The expert is kept apart; each reason begins with the stage that found it."""

    reasons: tuple[str, ...]
    detail: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Waiting:
    """The expert waits for one before it in the stream."""

    reason: str


@dataclass(frozen=True)
class Batched:
    """The arrivals of `also`, in this order, are merged and judged with the entry's own arrival, which comes first, as one candidate."""

    also: tuple[str, ...]


@dataclass(frozen=True)
class Halved:
    """The candidate of a batch is not accepted as a whole: none of its arrivals is in a batch of more than `most` from now on."""

    most: int
    detail: str


@dataclass(frozen=True)
class Merged:
    """A candidate was built beside the accepted state, which `on` names by its chain; in `place` of another arrival if given."""

    candidate: Version
    on: str
    place: str | None = None


@dataclass(frozen=True)
class Evaluated:
    """The candidate was scored and held against the gates."""

    scored: Scored | None
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class CanaryStarted:
    """The candidate answers a share of requests too, until there are enough of them, or it is too late. What it says is returned, or with
    `shadow` only compared."""

    share: float
    requests: int
    deadline_ms: int
    shadow: bool = False


@dataclass(frozen=True)
class CanaryEnded:
    """What the gates say of how the candidate answered `requests` real requests; none of them where somebody ended it."""

    requests: int
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class Promoted:
    """The candidate is accepted and served. `refold`: it is the accepted state without what was removed, made again; then `served` is
    what is served, if that is an older time step.
    """

    version: Version
    scored: Scored | None
    refold: bool = False
    served: Version | None = None


@dataclass(frozen=True)
class Held:
    """A person must decide."""

    reasons: tuple[str, ...]
    detail: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejected:
    """The candidate is not accepted; or a removal is not carried out, whose arrival then stays."""

    reasons: tuple[str, ...]
    detail: str


@dataclass(frozen=True)
class RolledBack:
    """What is served is the version of time step `version.t`. With an empty fingerprint it is asked for, and must be made first.

    `hold`: nothing is promoted until this is undone.
    """

    version: Version
    hold: bool
    reason: str


@dataclass(frozen=True)
class Removed:
    """An accepted expert leaves all merges, with those of `also`, its descendants; one that is not accepted is withdrawn.

    `force`: no gate can keep it. `descendants` says what was decided about experts that were trained from weights that held it.
    """

    reason: str
    force: bool = False
    descendants: Literal["none", "keep", "remove", "retrain"] = "none"
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Replaced:
    """The candidate is accepted and served, and takes the place of another arrival."""

    old: str
    version: Version
    scored: Scored | None


@dataclass(frozen=True)
class Purged:
    """The bytes of a removed expert are deleted, and its digest is refused from now on."""

    sha256: str
    reason: str


@dataclass(frozen=True)
class Released:
    """An operator lets an arrival go on in spite of the reasons `waived`."""

    reason: str
    waived: tuple[str, ...]


@dataclass(frozen=True)
class TokenIssued:
    """A token, as the sha256 of its secret, with what it may do. `expires_ms` is Unix time in milliseconds."""

    token: str
    role: Literal["reader", "submitter", "operator"]
    digest: str
    expires_ms: int
    owners: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    per_day: int | None = None
    label: str = ""


@dataclass(frozen=True)
class TokenRevoked:
    """The token is worth nothing from now on."""

    token: str
    reason: str


@dataclass(frozen=True)
class Note:
    """A remark of an operator."""

    text: str


Data = (
    ServiceStarted | ConfigSet | UploadCompleted | Received | Admitted | Quarantined | Waiting | Batched | Halved | Merged | Evaluated
    | CanaryStarted | CanaryEnded | Promoted | Held | Rejected | RolledBack | Removed | Replaced | Purged | Released | TokenIssued
    | TokenRevoked | Note
)  # fmt: skip
KINDS: dict[str, type] = {
    "service_started": ServiceStarted, "config_set": ConfigSet, "upload_completed": UploadCompleted,
    "received": Received, "admitted": Admitted, "quarantined": Quarantined, "waiting": Waiting, "batched": Batched,
    "halved": Halved, "merged": Merged,
    "evaluated": Evaluated, "canary_started": CanaryStarted, "canary_ended": CanaryEnded, "promoted": Promoted, "held": Held, "rejected": Rejected,
    "rolled_back": RolledBack, "removed": Removed, "replaced": Replaced, "purged": Purged, "released": Released,
    "token_issued": TokenIssued, "token_revoked": TokenRevoked, "note": Note,
}  # fmt: skip
"""The class of data of each kind of entry."""
_NAMES = {kind: name for name, kind in KINDS.items()}


@dataclass(frozen=True)
class Draft:
    """What somebody wants to append. A `Received` needs no arrival: it gets its id from the number of its entry."""

    data: Data
    arrival: str | None = None
    actor: str = "service"

    @property
    def kind(self) -> str:
        """The name of the kind of its data."""
        return _NAMES[type(self.data)]


@dataclass(frozen=True)
class Entry:
    """One entry. `time_ms` is Unix time in milliseconds and decides nothing; `actor` is a token's id or `service`."""

    seq: int
    prev: str
    kind: str
    time_ms: int
    actor: str
    arrival: str | None
    data: Data
    sha256: str

    @property
    def text(self) -> bytes:
        """What is written: canonical JSON, one line."""
        return canonical({**_body(self), "sha256": self.sha256}) + b"\n"


def arrival_id(seq: int) -> str:
    """The id of the arrival that entry `seq` brings."""
    return f"a-{seq:06d}"


def entry_of(draft: Draft, seq: int, prev: str, time_ms: int) -> Entry:
    """The entry that follows entry `seq - 1`, whose sha256 is `prev`. Raises `ValueError` for data that would not be read again."""
    arrival = arrival_id(seq) if isinstance(draft.data, Received) else draft.arrival
    data: Data = of_plain(type(draft.data), json.loads(canonical(plain(draft.data))), "data")
    bare = Entry(seq, prev, draft.kind, time_ms, draft.actor, arrival, data, "")
    return replace(bare, sha256=digest(_body(bare)))


def parse(text: bytes, where: str) -> Entry:
    """The entry in a text, which `where` names in messages. Raises `BrokenLog` unless it is exactly the text of an entry."""
    try:
        body: dict[str, Any] = json.loads(text)
        kind = KINDS[body["kind"]]
        data: Data = of_plain(kind, body["data"], "data")
        entry = Entry(**{**body, "data": data})
        if digest(_body(entry)) != entry.sha256 or entry.text.rstrip(b"\n") != text.rstrip(b"\n"):
            raise BrokenLog(f"{where}: the entry was altered: its content does not match its own sha256")
    except BrokenLog:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenLog(f"{where} is not an entry of the log: {error}") from None
    return entry


def chained(entries: Iterable[Entry], after: int = 0, prev: str = GENESIS) -> Iterator[Entry]:
    """The same entries, as far as each follows the one before. Raises `BrokenLog` naming the first that does not."""
    for entry in entries:
        if entry.seq != after + 1:
            what = "is missing" if entry.seq > after + 1 else f"is followed by entry {entry.seq}"
            raise BrokenLog(f"log entry {after + 1 if entry.seq > after + 1 else after} {what}")
        if entry.prev != prev:
            raise BrokenLog(
                f"log entry {entry.seq} does not follow entry {after}: one of the two was altered or replaced"
            )
        yield entry
        after, prev = entry.seq, entry.sha256


def _body(entry: Entry) -> dict[str, Any]:
    return {
        "seq": entry.seq, "prev": entry.prev, "kind": entry.kind, "time_ms": entry.time_ms, "actor": entry.actor,
        "arrival": entry.arrival, "data": plain(entry.data),
    }  # fmt: skip
