"""Where things lie in the page's two pictures: scores over arrivals, and the lineage of one arrival.

Pure geometry: numbers for the attributes of SVG, which templates write. Colours are in the style sheet.
"""

from dataclasses import dataclass

from merge_service.live import State
from pipeline.service.page.views import STOPPED, Relatives, scored_of

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 220, 34, 10, 10, 34
NODE, GAP, COLUMN = 26, 8, 240
SCORES = ("ka", "zs", "gm")


@dataclass(frozen=True)
class Line:
    """One score over arrivals: `points` as of a polyline."""

    name: str
    points: str


@dataclass(frozen=True)
class Mark:
    """An arrival that was not accepted."""

    x: float
    arrival: str
    status: str


@dataclass(frozen=True)
class Chart:
    """Scores over arrivals; `grid` are (y, label), `ticks` (x, t)."""

    lines: tuple[Line, ...]
    marks: tuple[Mark, ...]
    grid: tuple[tuple[float, str], ...]
    ticks: tuple[tuple[float, int], ...]
    served: float | None


@dataclass(frozen=True)
class Node:
    """One arrival in the graph of lineage."""

    name: str
    x: float
    y: float


@dataclass(frozen=True)
class Graph:
    """The lineage of one arrival: what its start held at the left, what was trained from it at the right."""

    nodes: tuple[Node, ...]
    edges: tuple[tuple[float, float, float, float], ...]
    height: int
    notes: tuple[tuple[float, str], ...]


def chart(state: State, whole: bool) -> Chart | None:
    """Every arrival is one step to the right; None before the first."""
    every = list(state.arrivals.values())
    if not every:
        return None
    step = (WIDTH - LEFT - RIGHT) / max(1, len(every))
    points: dict[str, list[str]] = {name: [] for name in SCORES}
    marks, accepted, served = list[Mark](), list[tuple[float, int]](), None
    for place, one in enumerate(every):
        x = round(LEFT + (place + 0.5) * step, 1)
        if one.t is None:
            if one.status in STOPPED:
                marks.append(Mark(x, one.id, one.status))
            continue
        accepted.append((x, one.t))
        served = x if one.id == state.served.arrival else served
        scored = scored_of(state, one)
        for name in SCORES:
            value = getattr(scored, name) if scored else None
            if value is not None:
                points[name].append(f"{x},{_y(value)}")
    lines = tuple(Line(name.upper(), " ".join(points[name])) for name in SCORES if points[name])
    stride = max(1, -(-len(accepted) // 10))
    grid = tuple((_y(value / 4), f"{value / 4:.2f}") for value in range(5))
    return Chart(lines, tuple(marks), grid, tuple(accepted[::stride]), served)


def graph(name: str, above: Relatives, below: Relatives) -> Graph | None:
    """None for an arrival that has neither ancestors nor descendants."""
    if not above.names and not below.names:
        return None
    tallest = max(len(above.names), len(below.names), 1)
    height = tallest * (NODE + GAP) + GAP + 20
    middle = (height - 20) / 2
    nodes, edges = [Node(name, COLUMN, middle)], list[tuple[float, float, float, float]]()
    for relatives, x in ((above, 0.0), (below, 2.0 * COLUMN)):
        first = middle - (len(relatives.names) - 1) * (NODE + GAP) / 2
        for place, one in enumerate(relatives.names):
            y = first + place * (NODE + GAP)
            nodes.append(Node(one, x, y))
            edges.append((x + 110, y, COLUMN, middle) if x == 0 else (COLUMN + 110, middle, x, y))
    said = ((0.0, above.more, "older"), (2.0 * COLUMN, below.more, "older"))
    notes = tuple((x, f"and {more} {what}") for x, more, what in said if more)
    return Graph(tuple(nodes), tuple(edges), height, notes)


def _y(value: float) -> float:
    return round(TOP + (1 - value) * (HEIGHT - TOP - BOTTOM), 1)
