"""Bodies of requests and answers of a live service.

Invariant: what a stranger wrote (task, owner, licence, note) is bounded and printable before the log has it.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from merge_service.live import Arrival, State
from pipeline.service.http.schemas import Body, Digest, File, Text
from pipeline.service.intake.tickets import MOST
from pipeline.service.intake.uploads import ID, MOST_FILES
from pipeline.service.tokens import Role, Token

ArrivalId = Annotated[str, Field(pattern="^a-[0-9]{6,12}$", description="e.g. a-000003")]
UploadId = Annotated[str, Field(pattern=f"^{ID}$")]
Short = Annotated[Text, Field(max_length=200)]
Several = Annotated[list[Short], Field(min_length=1, max_length=1000)]
Status = Literal[
    "received", "admitted", "waiting", "merged", "evaluated", "canary", "promoted", "superseded", "rolled_back", "held",
    "quarantined", "rejected", "withdrawn", "removed", "purged",
]  # fmt: skip
Descendants = Literal["none", "keep", "remove", "retrain"]


class UploadFile(Body):
    """A file that will come."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    bytes: Annotated[int, Field(ge=1, le=10**15)]
    sha256: Digest


class UploadBody(Body):
    """The files of one checkpoint: a *.safetensors, or shards with their *.safetensors.index.json."""

    task: Short
    files: Annotated[list[UploadFile], Field(min_length=1, max_length=MOST_FILES)]


class UploadShown(BaseModel):
    """An upload. Parts have `part_bytes` bytes, the last of a file what is left; `missing` lists ranges of parts, first and last."""

    id: str
    part_bytes: int
    missing: dict[str, list[tuple[int, int]]]


class ArrivalBody(Body):
    """An expert whose files were uploaded. `owner` is by default the only one that the token is for, else the token's own name. Without
    a ticket, `init` is what its sender claims; by default the base where every expert starts from it, else `foreign`."""

    task: Short
    upload: UploadId
    owner: Short | None = None
    license: Annotated[str, Field(max_length=200)] = ""
    note: Annotated[str, Field(max_length=1000)] = ""
    init: Literal["base", "foreign"] | None = None
    init_ticket: Annotated[str, Field(max_length=MOST)] | None = None


class Start(BaseModel):
    """The weights that the next expert of a task starts from: `files` below the address `place`, the weights with `sha256`. The ticket
    comes back with the expert, once, until `expires` (seconds since 1970). They are the start after entry `seq`, with `t` experts."""

    ticket: str
    expires: int
    seq: int
    t: int
    sha256: Digest
    strategy: dict[str, Any]
    files: list[File]
    place: str


class Came(BaseModel):
    """An arrival that is durable."""

    id: str
    status: Status


class VerdictShown(BaseModel):
    """What a gate found; the figures are null for those who could fit an expert to them."""

    gate: str
    verdict: Literal["pass", "fail", "undecided"]
    margin: float
    difference: float | None
    low: float | None
    high: float | None


class Scores(BaseModel):
    """Scores of the merge with it, in [0, 1]: over the tasks, over held-out datasets, and their geometric mean."""

    mean: float | None
    ka: float | None
    zs: float | None
    gm: float | None


class ArrivalShown(BaseModel):
    """One arrival and what became of it. `own` are scores of the expert alone on its task, `adapter` is the sha256 of the adapter that
    came, where the expert was made of one."""

    id: str
    seq: int
    time_ms: int
    task: str
    owner: str
    license: str
    note: str
    status: Status
    t: int | None
    sha256: str
    bytes: int
    init: str
    origin: str
    adapter: str
    replaces: str | None
    reasons: list[str]
    detail: str
    own: dict[str, float]
    verdicts: list[VerdictShown]
    scored: Scores | None

    @classmethod
    def of(cls, state: State, one: Arrival, whole: bool) -> "ArrivalShown":
        """An arrival of the state; `whole` with figures."""
        status: Any = state.shown(one.id)
        said = whole or not any(
            reason.startswith(("regression.", "undecided.", "canary.")) for reason in one.reasons
        )
        scored = one.scored if whole or one.status == "accepted" else None
        return cls(
            id=one.id, seq=one.seq, time_ms=one.time_ms, task=one.task, owner=one.owner, license=one.license, note=one.note,
            status=status, t=one.t, sha256=one.sha256, bytes=one.bytes, init=one.init, origin=one.origin,
            adapter=one.adapter, replaces=one.replaces, reasons=[*one.reasons], detail=one.detail if said else "", own=dict(one.own),
            verdicts=[
                VerdictShown(
                    gate=gate.gate, verdict=gate.verdict, margin=gate.margin,
                    difference=gate.difference if whole else None, low=gate.low if whole else None,
                    high=gate.high if whole else None,
                )
                for gate in one.verdicts
            ],
            scored=Scores(mean=scored.mean, ka=scored.ka, zs=scored.zs, gm=scored.gm) if scored else None,
        )  # fmt: skip


class ArrivalPage(BaseModel):
    """Arrivals in the order they came; `next` is the `after` of the next page, null at the end."""

    arrivals: list[ArrivalShown]
    next: str | None


class Lineage(BaseModel):
    """Which arrivals the start of this one held, at first hand (`parents`) or any, and which were trained from weights that held it."""

    id: str
    parents: list[str]
    ancestors: list[str]
    descendants: list[str]


class Why(Body):
    """Why, for the log. With `if_head` nothing is done unless the log still ends with this sha256."""

    reason: Short
    if_head: Digest | None = None


class RollbackBody(Why):
    """The time step to serve; 0 is the base. `hold`: nothing is promoted until another rollback."""

    t: Annotated[int, Field(ge=0, le=10**9)]
    hold: bool = False


class RemovalAsked(Why):
    """`descendants` decides about experts that were trained from weights that held it; `force` removes although a gate fails; `purge`
    deletes the bytes as well, and refuses them from then on."""

    descendants: Descendants = "none"
    force: bool = False
    purge: bool = False


class HeadShown(BaseModel):
    """The newest entry. Whoever keeps it can prove a later change of what came before."""

    seq: int
    sha256: str


class EntryShown(BaseModel):
    """An entry of the log. Its sha256 is that of its canonical JSON without `sha256`; `prev` is that of the entry before."""

    seq: int
    prev: str
    kind: str
    time_ms: int
    actor: str
    arrival: str | None
    data: dict[str, Any]
    sha256: str


class LogPage(BaseModel):
    """Entries in order, and the head at that moment."""

    entries: list[EntryShown]
    head: HeadShown


class TokenBody(Body):
    """A token to issue. `tasks` and `owners` bound what it may send (any by default), `per_day` how many experts in 24 hours."""

    role: Role
    days: Annotated[float, Field(gt=0, le=3650)] = 90
    tasks: Several | None = None
    owners: Several | None = None
    per_day: Annotated[int, Field(ge=0, le=10**9)] | None = None
    note: Annotated[str, Field(max_length=200)] = ""


class TokenShown(BaseModel):
    """A token without its secret. Times are seconds since 1970."""

    id: str
    role: Role
    created: float
    expires: float | None
    revoked: float | None
    tasks: list[str] | None
    owners: list[str] | None
    per_day: int | None
    note: str

    @classmethod
    def of(cls, token: Token) -> "TokenShown":
        """What is kept of a token, without its digest."""
        return cls(
            id=token.id, role=token.role, created=token.created, expires=token.expires, revoked=token.revoked,
            tasks=None if token.tasks is None else [*token.tasks],
            owners=None if token.owners is None else [*token.owners],
            per_day=token.per_day, note=token.note,
        )  # fmt: skip


class TokenIssuedShown(TokenShown):
    """A new token; its text is shown this once."""

    token: str


class TokenList(BaseModel):
    """All tokens ever issued, the oldest first."""

    tokens: list[TokenShown]
