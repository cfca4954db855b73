"""What the page shows, as values: pure functions of the state of a service.

Invariant: a view holds text as it came; templates escape all of it. Figures of gates are shown only to those who could not fit an expert
to them (`whole`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from merge_service.live import Arrival, Scored, State, Verdict, ancestors, backlog, descendants
from merge_service.timelines import Strategy

PER_PAGE = 50
SHOWN_RELATIVES = 12
STOPPED = frozenset({"quarantined", "rejected", "withdrawn", "removed", "purged"})


@dataclass(frozen=True)
class Row:
    """One line of the timeline."""

    id: str
    when: str
    task: str
    owner: str
    status: str
    t: int | None
    ka: str
    zs: str
    gm: str
    reason: str


@dataclass(frozen=True)
class Overview:
    """How a service stands. `rows` are those of this page, the newest first."""

    name: str
    seq: int
    head: str
    t: int
    served_t: int
    served_sha256: str
    served_by: str | None
    on_hold: bool
    challenger: str | None
    removal: str | None
    asked: int | None
    backlog: Mapping[str, int]
    arrivals: int
    rows: tuple[Row, ...]
    page: int
    pages: int


@dataclass(frozen=True)
class GateShown:
    """What a gate found; figures are empty for those who may not see them."""

    name: str
    verdict: str
    difference: str
    interval: str
    margin: str


@dataclass(frozen=True)
class Relatives:
    """Arrivals on one side of another in the graph of lineage; `more` are not drawn."""

    names: tuple[str, ...]
    more: int

    @classmethod
    def of(cls, names: Sequence[str]) -> "Relatives":
        """The newest of them."""
        return cls(tuple(names[-SHOWN_RELATIVES:]), max(0, len(names) - SHOWN_RELATIVES))


@dataclass(frozen=True)
class Detail:
    """One arrival. `can` are the operations that its state allows."""

    row: Row
    facts: tuple[tuple[str, str], ...]
    reasons: tuple[str, ...]
    said: str
    gates: tuple[GateShown, ...]
    figures: tuple[tuple[str, str], ...]
    above: Relatives
    below: Relatives
    descendants: tuple[str, ...]
    can: frozenset[str]


def overview(state: State, page: int, whole: bool) -> Overview:
    """The service, and one page of its arrivals; a page that is not there is the nearest."""
    pages = max(1, -(-len(state.arrivals) // PER_PAGE))
    page = min(max(page, 1), pages)
    newest = list(reversed(list(state.arrivals.values())))
    served, challenger = state.served, state.challenger
    return Overview(
        state.name, state.seq, state.head, state.t, served.t, served.sha256, served.arrival, state.on_hold,
        challenger.id if challenger else None, state.removal.arrival if state.removal else None,
        state.asked.t if state.asked else None, backlog(state), len(newest),
        tuple(row(state, one, whole) for one in newest[(page - 1) * PER_PAGE : page * PER_PAGE]), page, pages,
    )  # fmt: skip


def row(state: State, one: Arrival, whole: bool) -> Row:
    """One arrival as a line."""
    scored = scored_of(state, one) if whole or one.status == "accepted" else None
    return Row(
        one.id, moment(one.time_ms), one.task, one.owner, state.shown(one.id), one.t,
        number(scored.ka if scored else None), number(scored.zs if scored else None), number(scored.gm if scored else None),
        one.reasons[0] if one.reasons else "",
    )  # fmt: skip


def scored_of(state: State, one: Arrival) -> Scored | None:
    """The scores of the merge with an arrival: as accepted, else of its candidate."""
    return state.sequence[one.t - 1].scored if one.t else one.scored


def detail(state: State, strategy: Strategy, one: Arrival, whole: bool) -> Detail:
    """One arrival with its gates, its lineage, and what may be done about it."""
    above = ancestors(state, strategy, one.id)
    below = descendants(state, strategy, one.id)
    status, scored = one.status, scored_of(state, one)
    can = {
        "release": status in ("held", "quarantined", "rejected")
        and not any(reason.startswith(("format.", "door.")) for reason in one.reasons),
        "reject": status == "held" and bool(one.expert),
        "remove": status not in ("withdrawn", "removed", "purged"),
        "purge": status in ("removed", "withdrawn", "quarantined", "rejected", "held"),
    }
    facts = (
        ("Task", one.task), ("Owner", one.owner), ("Licence", one.license or "not given"), ("Note", one.note or "none"),
        ("Came", moment(one.time_ms)), ("By", one.origin), ("Started from", one.init), ("Bytes", f"{one.bytes:,}"),
        ("sha256", one.sha256),
        ("Deployed with it", scored_text(scored) if scored and (whole or status == "accepted") else "not scored"),
    )  # fmt: skip
    return Detail(
        row(state, one, whole), facts, one.reasons, one.detail if whole else "",
        tuple(_gate(found, whole) for found in one.verdicts),
        tuple((name, f"{value:.4g}") for name, value in sorted(one.figures.items())) if whole else (),
        Relatives.of(above), Relatives.of(below), tuple(name for name in below if state.arrivals[name].status not in STOPPED),
        frozenset(name for name, allowed in can.items() if allowed),
    )  # fmt: skip


def number(value: float | None) -> str:
    """A score with three digits; a dash without one."""
    return "–" if value is None else f"{value:.3f}"


def scored_text(scored: Scored) -> str:
    """KA, ZS and GM in words."""
    return f"KA {number(scored.ka)}, ZS {number(scored.zs)}, GM {number(scored.gm)}"


def moment(time_ms: int) -> str:
    """A time in UTC."""
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _gate(found: Verdict, whole: bool) -> GateShown:
    return GateShown(
        found.gate, found.verdict,
        f"{found.difference:+.3f}" if whole else "", f"{found.low:+.3f} to {found.high:+.3f}" if whole else "",
        f"{found.margin:g}",
    )  # fmt: skip
