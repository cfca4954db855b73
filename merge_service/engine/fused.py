"""Spans of a merge handed to the fused loops: addresses and numbers go into tables, nothing is copied.

Invariant: only asked for spans it `fits`; what comes back are the bits of the array definitions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from merge_service.blocks import kernels
from merge_service.blocks.masks import ceiling
from merge_service.blocks.spans import Scratch, Span
from merge_service.checkpoints.checkpoint import Checkpoint
from merge_service.engine.task import MergeTask
from merge_service.techniques.place import Election, Place, State
from merge_service.techniques.thinning import bounds, rescaling

_KINDS = {"F32": kernels.F32, "F16": kernels.F16, "BF16": kernels.BF16, "F64": kernels.F64}


_LOOPS = {
    "mean": kernels.MEAN,
    "sum": kernels.SUM,
    "largest": kernels.LARGEST,
    "mean of sign": kernels.MEAN_OF_SIGN,
    "sum of sign": kernels.SUM_OF_SIGN,
    "max of sign": kernels.MAX_OF_SIGN,
}


@dataclass(frozen=True)
class Outcome:
    """A span's result. `squares`: partial sums of (result - base)^2; `bad`: orders of inputs that are not finite, 0 the base."""

    block: np.ndarray
    election: Election
    squares: list[float]
    bad: tuple[int, ...]


def fits(weights: Sequence[Checkpoint], name: str) -> bool:
    """Whether the loops can read this tensor where it lies."""
    return all(one.address(name) is not None and one.tensors[name].kind.name in _KINDS for one in weights)


class Fused:
    """The loops for one task."""

    def __init__(self, task: MergeTask) -> None:
        self.task, self.combine, self.base, self.inputs = task, task.rule, task.base, task.inputs
        self.scratch = Scratch()
        self._fit: dict[str, bool] = {}
        self._tables: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    @classmethod
    def of(cls, task: MergeTask) -> "Fused | None":
        """The loops for a task, None where there are none for its rule or for how it thins out."""
        return cls(task) if task.rule.kernel is not None and task.thin.fused else None

    def fits(self, name: str) -> bool:
        """Whether the loops can work on this tensor: they compute in float32 and read numbers where they lie."""
        if name not in self._fit:
            read = [*([self.base] if self.base else []), *(expert.weights for expert in self.inputs)]
            self._fit[name] = self.task.compute(name).itemsize == 4 and fits(read, name)
        return self._fit[name]

    def run(
        self,
        span: Span,
        places: Mapping[int, Place],
        *,
        majority: int,
        held: State | None,
        finish: bool,
        squares: bool,
    ) -> Outcome:
        """Work through one span. `held` is a state to be continued in place, None where none is kept."""
        job, terms = self._tables_of(span, places)
        job["factor"], job["majority"] = self.task.factors[span.name], majority
        job["finish"], job["squares"] = finish, squares
        job["whole"] = held is not None
        state, votes = self._state(held)
        out = self.scratch.take("out", span.size if finish else 0, np.float32)
        sums = np.zeros(-(-span.size // kernels.GRAIN) if squares else 0)
        kernels.blend(job, terms, state, votes, out, sums)
        if held is not None:
            for row, role in enumerate(self.combine.floats):
                held[role] = state[row]
        election = Election(int(job["balance"][0]), bool(job["contested"][0]))
        return Outcome(out, election, sums.tolist(), self._bad(job, terms))

    def products(self, span: Span) -> tuple[np.ndarray, tuple[int, ...]]:
        """Partial inner products of all pairs [grains, experts, experts] (upper triangle), and who is not finite."""
        places = {expert.order: Place(expert.order) for expert in self.inputs}
        job, terms = _at(span, *self._table(span.name, places))
        partial = np.zeros((-(-span.size // kernels.GRAIN), len(self.inputs), len(self.inputs)))
        kernels.products(job, terms, partial)
        return partial, self._bad(job, terms)

    def _bad(self, job: np.ndarray, terms: np.ndarray) -> tuple[int, ...]:
        experts = [expert.order for expert, found in zip(self.inputs, terms["bad"]) if found]
        return (*((0,) if job["bad"][0] else ()), *experts)

    def _state(self, held: State | None) -> tuple[np.ndarray, np.ndarray]:
        rows = len(self.combine.floats)
        if held is None:
            state = self.scratch.take("state", rows * kernels.LANES, np.float32).reshape(rows, -1)
            return state, self.scratch.take("votes", kernels.LANES, np.uint32)
        first = held[self.combine.floats[0]]
        state = self.scratch.take("state", rows * first.size, np.float32).reshape(rows, -1)
        for row, role in enumerate(self.combine.floats):
            state[row] = held[role]
        return state, held.get("votes", np.empty(0, np.uint32))

    def _tables_of(self, span: Span, places: Mapping[int, Place]) -> tuple[np.ndarray, np.ndarray]:
        if span.name not in self._tables:
            self._tables[span.name] = self._table(span.name, places)
        return _at(span, *self._tables[span.name])

    def _table(self, name: str, places: Mapping[int, Place]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        job, terms = np.zeros(1, kernels.JOB), np.zeros(len(self.inputs), kernels.TERM)
        sizes = np.zeros(1 + len(self.inputs), np.int64)
        job["rule"], job["delta"] = _LOOPS[self.combine.kernel or ""], self.task.moves
        if self.base is not None:
            job["base"], job["kind"], sizes[0] = _where(self.base, name)
        for row, expert in enumerate(self.inputs):
            place = places[expert.order]
            term = terms[row]
            term["address"], term["kind"], sizes[1 + row] = _where(expert.weights, name)
            term["first"], term["share"] = place.order == 1, place.share
            term["low"], term["high"] = bounds(place.limits, np.float32)
            if place.turn is not None:
                term["turns"], term["kept"], term["turned"] = 1, *place.turn
            if place.key is not None and place.density < 1:
                term["key"], term["limit"] = place.key, ceiling(place.density)
                term["gain"] = rescaling(place)
        return job, terms, sizes


def _at(
    span: Span, template: np.ndarray, experts: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The tables of a tensor, moved to where a span begins."""
    job, terms = template.copy(), experts.copy()
    job["start"], job["size"] = span.start, span.size
    job["base"] += job["base"].dtype.type(span.start * int(sizes[0]))
    terms["address"] += (sizes[1:] * span.start).astype(np.uint64)
    return job, terms


def _where(weights: Checkpoint, name: str) -> tuple[int, int, int]:
    address = weights.address(name)
    assert address is not None
    kind = weights.tensors[name].kind
    return address, _KINDS[kind.name], kind.itemsize


class Magnitudes:
    """|expert - base| of one span for some experts, as bits."""

    def __init__(self, base: Checkpoint, experts: Sequence[Checkpoint], span: Span) -> None:
        self.job, self.terms = np.zeros(1, kernels.JOB), np.zeros(len(experts), kernels.TERM)
        self.size = span.size
        self.job["size"] = span.size
        address, kind, size = _where(base, span.name)
        self.job["base"], self.job["kind"] = address + span.start * size, kind
        for row, weights in enumerate(experts):
            address, kind, size = _where(weights, span.name)
            self.terms[row]["address"], self.terms[row]["kind"] = address + span.start * size, kind

    def sift(
        self, windows: "Windows", scratch: Scratch
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """How many more lie below each window, what lies inside, and in which window each; some blocks at a time."""
        room = max(2 * kernels.LANES * windows.rows.size, 1 << 15)
        chosen, owners = scratch.take("chosen", room, np.uint32), scratch.take("owners", room, np.uint16)
        at = 0
        while at < self.size:
            below = np.zeros(windows.rows.size, np.int64)
            at, found = kernels.sift_span(
                self.job, self.terms, windows.lows, windows.highs, windows.rows, at, below, chosen, owners
            )
            yield below, chosen[:found], owners[:found]

    @property
    def bad(self) -> tuple[int, ...]:
        """Rows of experts that hold numbers that are not finite; -1 for the base."""
        return (*((-1,) if self.job["bad"][0] else ()), *np.flatnonzero(self.terms["bad"]).tolist())


@dataclass(frozen=True)
class Windows:
    """Windows for `Magnitudes`: their ends and bin widths, the row of the expert each is about, where its bins begin."""

    lows: np.ndarray
    highs: np.ndarray
    shifts: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
