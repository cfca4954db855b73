"""Runs the fused loops on spans of a merge: fills their tables with addresses and numbers, and copies no data.

Invariant: only spans for which `fits` is true are run; the results have the bits of the array definitions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from merge_service.blocks import loops
from merge_service.blocks.masks import ceiling
from merge_service.blocks.moments import Moments
from merge_service.blocks.spans import Scratch, Span
from merge_service.checkpoints.weights import Weights
from merge_service.engine.task import MergeTask
from merge_service.techniques.place import Election, Place, State
from merge_service.techniques.thinning import bounds, rescaling

_KINDS = {"F32": loops.F32, "F16": loops.F16, "BF16": loops.BF16, "F64": loops.F64}


_LOOPS = {
    "mean": loops.MEAN,
    "sum": loops.SUM,
    "largest": loops.LARGEST,
    "mean of sign": loops.MEAN_OF_SIGN,
    "sum of sign": loops.SUM_OF_SIGN,
    "max of sign": loops.MAX_OF_SIGN,
}


@dataclass(frozen=True)
class Outcome:
    """A span's result, its moments where they were taken on the way, and the orders of inputs that are not finite, 0 the base."""

    block: np.ndarray
    election: Election
    moments: Moments
    bad: tuple[int, ...]


def fits(weights: Sequence[Weights], name: str) -> bool:
    """Whether the loops can read this tensor in place."""
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
        """The loops for a task; None if there are none for its rule or its thinning."""
        return cls(task) if task.rule.kernel is not None and task.thin.fused else None

    def fits(self, name: str) -> bool:
        """Whether the loops can process this tensor: they compute in float32 and read numbers in place."""
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
        sums: int,
    ) -> Outcome:
        """Process one span. `held` is a state to continue in place, None if none is kept; `sums` is how many of the moments are
        requested: 0, 1 or 3."""
        job, terms = self._tables_of(span, places)
        job["factor"], job["majority"] = self.task.factors[span.name], majority
        job["finish"], job["sums"] = finish, sums
        job["whole"] = held is not None
        state, votes = self._state(held)
        out = self.scratch.take("out", span.size if finish else 0, np.float32)
        found = np.zeros((-(-span.size // loops.GRAIN) if sums else 0, 3))
        loops.blend(job, terms, state, votes, out, found)
        if held is not None:
            for row, role in enumerate(self.combine.floats):
                held[role] = state[row]
        election = Election(int(job["balance"][0]), bool(job["contested"][0]))
        return Outcome(out, election, found.tolist(), self._bad(job, terms))

    def products(self, span: Span) -> tuple[np.ndarray, tuple[int, ...]]:
        """Partial inner products of all pairs [grains, experts, experts] (upper triangle), and the inputs that are not finite."""
        places = {expert.order: Place(expert.order) for expert in self.inputs}
        job, terms = _at(span, *self._table(span.name, places))
        partial = np.zeros((-(-span.size // loops.GRAIN), len(self.inputs), len(self.inputs)))
        loops.products(job, terms, partial)
        return partial, self._bad(job, terms)

    def _bad(self, job: np.ndarray, terms: np.ndarray) -> tuple[int, ...]:
        experts = [expert.order for expert, found in zip(self.inputs, terms["bad"]) if found]
        return (*((0,) if job["bad"][0] else ()), *experts)

    def _state(self, held: State | None) -> tuple[np.ndarray, np.ndarray]:
        rows = len(self.combine.floats)
        if held is None:
            state = self.scratch.take("state", rows * loops.LANES, np.float32).reshape(rows, -1)
            return state, self.scratch.take("votes", loops.LANES, np.uint32)
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
        job, terms = np.zeros(1, loops.JOB), np.zeros(len(self.inputs), loops.TERM)
        sizes = np.zeros(1 + len(self.inputs), np.int64)
        job["rule"], job["delta"] = _LOOPS[self.combine.kernel or ""], self.task.moves
        if self.base is not None:
            job["base"], job["kind"], sizes[0] = _where(self.base, name)
        for row, expert in enumerate(self.inputs):
            place = places[expert.order]
            term = terms[row]
            term["address"], term["kind"], sizes[1 + row] = _where(expert.weights, name)
            term["first"], term["share"] = place.order == 1, place.share
            term["low"], term["high"] = bounds(place.thresholds, np.float32)
            if place.turn is not None:
                term["turns"], term["kept"], term["turned"] = 1, *place.turn
            if place.key is not None and place.density < 1:
                term["key"], term["limit"] = place.key, ceiling(place.density)
                term["gain"] = rescaling(place)
        return job, terms, sizes


def _at(
    span: Span, template: np.ndarray, experts: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The tables of a tensor, moved to the start of a span."""
    job, terms = template.copy(), experts.copy()
    job["start"], job["size"] = span.start, span.size
    job["base"] += job["base"].dtype.type(span.start * int(sizes[0]))
    terms["address"] += (sizes[1:] * span.start).astype(np.uint64)
    return job, terms


def _where(weights: Weights, name: str) -> tuple[int, int, int]:
    address = weights.address(name)
    assert address is not None
    kind = weights.tensors[name].kind
    return address, _KINDS[kind.name], kind.itemsize


class Magnitudes:
    """|expert - base| of one span for some experts, as bits."""

    def __init__(self, base: Weights, experts: Sequence[Weights], span: Span) -> None:
        self.job, self.terms = np.zeros(1, loops.JOB), np.zeros(len(experts), loops.TERM)
        self.size = span.size
        self.job["size"] = span.size
        address, kind, size = _where(base, span.name)
        self.job["base"], self.job["kind"] = address + span.start * size, kind
        for row, weights in enumerate(experts):
            address, kind, size = _where(weights, span.name)
            self.terms[row]["address"], self.terms[row]["kind"] = address + span.start * size, kind

    def sift(
        self, windows: loops.Windows, scratch: Scratch
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Per batch of blocks: how many values lie below each window, the values inside windows, and the window of each."""
        room = max(2 * loops.LANES * windows.rows.size, 1 << 15)
        chosen, owners = scratch.take("chosen", room, np.uint32), scratch.take("owners", room, np.uint16)
        at = 0
        while at < self.size:
            at, found, below = loops.sift_span(self.job, self.terms, windows, at, chosen, owners)
            yield below, chosen[:found], owners[:found]

    @property
    def bad(self) -> tuple[int, ...]:
        """Rows of experts that hold numbers that are not finite; -1 for the base."""
        return (*((-1,) if self.job["bad"][0] else ()), *np.flatnonzero(self.terms["bad"]).tolist())
