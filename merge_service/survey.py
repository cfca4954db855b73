"""What a merge must know of whole tensors before it can start: answered from the files, span by span.

`Surveyor` answers the questions of `thresholds.search`, and those for sums, for the tensors it was given. Its answers add up with
those of others that were given other tensors: that is all a merge on several machines has to exchange.

Invariant: sums are taken over grains of fixed size and added up exactly, counts are integers: no answer depends on
blocks, threads or machines.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np

from merge_service import kernels
from merge_service.checkpoint import Checkpoint
from merge_service.dtypes import decode
from merge_service.engine import GRAIN, Scratch, Span, run, spans, totals
from merge_service.fused import Magnitudes, fits
from merge_service.joint import score, selected, variance
from merge_service.rules import Place, sparsify
from merge_service.thresholds import (
    RUN,
    Answer,
    Count,
    Counted,
    Grams,
    Key,
    Products,
    Quantity,
    Question,
    Summed,
    Sums,
    Survey,
    Surveyed,
    Window,
    stride_of,
)

if TYPE_CHECKING:
    from merge_service.blend import Blend

BLOCK = 1 << 18
"""Elements per span of a counting pass: the base's stay in a core's cache while every expert is held against them."""


class Blocks:
    """The task vectors of all experts over the elements that are looked at, each read when it is first asked for."""

    def __init__(self, read: Callable[[int], np.ndarray], places: Mapping[int, Place]) -> None:
        self.read, self.places, self._held = read, places, dict[int, np.ndarray]()

    def one(self, order: int) -> np.ndarray:
        """That of the expert of this number."""
        if order not in self._held:
            self._held[order] = self.read(order)
        return self._held[order]

    @property
    def all(self) -> tuple[list[np.ndarray], list[Place]]:
        """Those of all experts, in order, and what is known of their places."""
        return [self.one(order) for order in self.places], list(self.places.values())

    @cached_property
    def selected(self) -> dict[int, np.ndarray]:
        """Those of all experts where they differ enough."""
        return dict(zip(self.places, selected(np, *self.all)))


class Surveyor:
    """Answers for `tensors` (name, number of elements) of a blend."""

    def __init__(self, blend: "Blend", tensors: Iterable[tuple[str, int]]) -> None:
        self.blend, self.scratch, self.lock = blend, Scratch(), threading.Lock()
        self.tensors, self.groups = list(tensors), dict[str, list[tuple[str, int]]]()
        for name, numel in self.tensors:
            self.groups.setdefault(blend.group(name), []).append((name, numel))
        self.inputs = {expert.order: expert for expert in blend.inputs}
        self._base_runs: dict[str, np.ndarray] = {}

    def answer(self, question: Question) -> Answer:
        """What is known here about what is asked for."""
        if isinstance(question, Products):
            return Grams(self.blend.grams(self.tensors))
        if isinstance(question, Sums):
            return self._sums(question)
        self.blend.adopt(question.quantity.given)
        if isinstance(question, Count):
            return self._count(question)
        found = run(partial(self._survey, question), question.keys, self.blend.threads)
        return dict(zip(question.keys, found))

    def _survey(self, question: Survey, key: Key) -> Surveyed:
        (group, order), quantity = key, question.quantity
        stride = stride_of(self.blend.group_sizes[group])
        found, still, total = [np.empty(0, quantity.word)], set(), 0
        for name, numel in self.groups.get(group, []):
            blocks = Blocks(partial(self._draw, name, numel, stride), self._places(Span(name, 0, numel)))
            with np.errstate(all="ignore"):
                drawn = self._measure(quantity, order, blocks)
            if not question.count_frozen and not drawn.any() and not self._moved(name, numel, order):
                still.add(name)
                continue
            found.append(quantity.words(drawn))
            total += numel
        return Surveyed(total, np.concatenate(found), frozenset(still))

    def _draw(self, name: str, numel: int, stride: int, order: int) -> np.ndarray:
        """Runs of a task vector. What depends on where an element lies takes them for the tensor's first: a fair sample still."""
        assert self.blend.base is not None
        compute = self.blend.compute(name)
        if name not in self._base_runs:
            self._base_runs[name] = _runs(self.blend.base, name, numel, stride).astype(compute, copy=False)
        theirs = _runs(self.inputs[order].weights, name, numel, stride)
        return theirs.astype(compute, copy=False) - self._base_runs[name]

    def _moved(self, name: str, numel: int, order: int) -> bool:
        return any(bool(self._delta(span, order).any()) for span in spans([(name, numel)], BLOCK))

    def _count(self, question: Count) -> dict[Key, Counted]:
        totals = {key: Counted.none(windows) for key, windows in question.windows.items()}
        asked: dict[str, list[Key]] = {}
        for key in question.windows:
            asked.setdefault(key[0], []).append(key)

        def work(span: Span) -> None:
            blocks = self._blocks(span)
            for key in asked[self.blend.group(span.name)]:
                if span.name not in question.still.get(key, ()):
                    self._count_span(span, blocks, key[1], question, question.windows[key], totals[key])

        block = GRAIN if question.quantity.joint else BLOCK  # joint ones hold a block of every expert
        over = [span for group in asked for span in spans(self.groups.get(group, []), block)]
        run(work, over, self.blend.threads)
        return totals

    def _count_span(
        self,
        span: Span,
        blocks: Blocks,
        order: int,
        question: Count,
        windows: Sequence[Window],
        total: Counted,
    ) -> None:
        quantity = question.quantity
        lows, highs = (np.array(ends, quantity.word) for ends in zip(*((w.low, w.high) for w in windows)))
        chosen = self.scratch.take("chosen", len(windows) * span.size, quantity.word).reshape(
            len(windows), -1
        )
        if quantity.name == "magnitude" and not quantity.wide and self._fits(span, order):
            magnitudes = self._magnitudes(span, order)
            below, found = magnitudes.sift(lows, highs, chosen)
            self._check(magnitudes, order)
        else:
            words = quantity.words(self._measure_span(quantity, span, order, blocks))
            counts = [kernels.sift(words, low, high, row) for low, high, row in zip(lows, highs, chosen)]
            below, found = np.array(counts).T
        with self.lock:
            for number, window in enumerate(windows):
                total.below[number] += int(below[number])
                shift = quantity.word.type(window.shift)
                kernels.tally(chosen[number, : found[number]], lows[number], shift, total.bins[number])

    def _sums(self, question: Sums) -> Summed:
        for quantity in question.quantities:
            self.blend.adopt(quantity.given)

        def work(span: Span) -> list[tuple[tuple[str, str, int], list[float]]]:
            blocks = self._blocks(span)
            return [
                ((quantity.name, span.name, order), totals(self._measure_span(quantity, span, order, blocks)))
                for order in self.inputs
                for quantity in question.quantities
            ]

        parts: dict[tuple[str, str, int], list[float]] = {}
        for found in run(work, spans(self.tensors, GRAIN), self.blend.threads):
            for key, part in found:
                parts.setdefault(key, []).extend(part)
        return Summed(parts)

    def _measure_span(self, quantity: Quantity, span: Span, order: int, blocks: Blocks) -> np.ndarray:
        start = self.blend.cover(span).start
        return self._measure(quantity, order, blocks)[span.start - start : span.stop - start]

    def _measure(self, quantity: Quantity, order: int, blocks: Blocks) -> np.ndarray:
        """A quantity of one expert (of all, for a variance), of the type it is ranked or summed in."""
        technique, params = self.blend.technique, self.blend.params
        if quantity.name == "magnitude":
            return np.abs(blocks.one(order))
        if quantity.name == "thinned":
            return np.abs(sparsify(np, technique, params, blocks.one(order), blocks.places[order]))
        if quantity.name == "energy":
            return np.square(blocks.selected[order], dtype=np.float64)
        if quantity.name == "variance":
            return variance(np, blocks.all[0])
        assert quantity.name == "score", quantity.name
        return score(np, params, *blocks.all, list(blocks.places).index(order))

    def _places(self, span: Span) -> dict[int, Place]:
        return {order: self.blend.place(expert, span) for order, expert in self.inputs.items()}

    def _blocks(self, span: Span) -> Blocks:
        rows = self.blend.cover(span)
        return Blocks(partial(self._delta, rows), self._places(rows))

    def _delta(self, span: Span, order: int) -> np.ndarray:
        return np.subtract(self.blend.numbers(self.inputs[order], span), self.blend.base_block(span))

    def _fits(self, span: Span, order: int) -> bool:
        assert self.blend.base is not None
        return fits((self.blend.base, self.inputs[order].weights), span.name)

    def _magnitudes(self, span: Span, order: int) -> Magnitudes:
        assert self.blend.base is not None
        return Magnitudes(self.blend.base, self.inputs[order].weights, span)

    def _check(self, magnitudes: Magnitudes, order: int) -> None:
        self.blend.refuse([number for number, bad in zip((0, order), magnitudes.bad) if bad])


def _runs(weights: Checkpoint, name: str, numel: int, stride: int) -> np.ndarray:
    """Of every `stride` elements the first 16, as numbers."""
    raw, rows = weights.raw(name), numel // stride
    picked = raw[: rows * stride].reshape(rows, stride)[:, :RUN].reshape(-1)
    last = raw[rows * stride :] if stride == RUN else raw[rows * stride :][:RUN]
    return decode(np.concatenate([picked, last]), weights.tensors[name].kind)
