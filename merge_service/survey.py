"""What a merge must know of whole tensors before it can start: answered from the files, span by span.

`Surveyor` answers the questions of `thresholds.search`, and sums of products, for the tensors it was given. Its answers add up with
those of others that were given other tensors: that is all a merge on several machines has to exchange.

Invariant: sums are taken over grains of fixed size and added up exactly, counts are integers: no answer depends on
blocks, threads or machines.
"""

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from merge_service import kernels
from merge_service.checkpoint import Checkpoint
from merge_service.dtypes import decode
from merge_service.engine import Scratch, Span, run, spans
from merge_service.fused import Magnitudes, fits
from merge_service.thresholds import (
    RUN,
    Answer,
    Count,
    Counted,
    Grams,
    Key,
    Products,
    Question,
    Surveyed,
    Window,
    stride_of,
)

if TYPE_CHECKING:
    from merge_service.blend import Blend, Input

BLOCK = 1 << 17
"""Elements per span of a counting pass: the base's stay in a core's cache while every expert is held against them."""


class Surveyor:
    """Answers for `tensors` (name, number of elements) of a blend."""

    def __init__(self, blend: "Blend", tensors: Iterable[tuple[str, int]]) -> None:
        self.blend, self.scratch, self.lock = blend, Scratch(), threading.Lock()
        self.tensors, self.groups = list(tensors), dict[str, list[tuple[str, int]]]()
        for name, numel in self.tensors:
            self.groups.setdefault(blend.group(name), []).append((name, numel))
        self.inputs = {expert.order: expert for expert in blend.inputs}
        self.wide = any(blend.compute(name).itemsize == 8 for name, _ in blend.merged)
        self._base_runs: dict[str, np.ndarray] = {}
        self.word = np.dtype(np.uint64 if self.wide else np.uint32)

    def answer(self, question: Question) -> Answer:
        """What is known here about what is asked for."""
        if isinstance(question, Products):
            return Grams(self.blend.grams(self.tensors))
        if isinstance(question, Count):
            return self._count(question)
        return self._survey(question.key, question.count_frozen)

    def _survey(self, key: Key, count_frozen: bool) -> Surveyed:
        group, order = key
        stride = stride_of(self.blend.group_sizes[group])
        found, still, total = [np.empty(0, self.word)], set(), 0
        for name, numel in self.groups.get(group, []):
            drawn = self._draw(name, numel, stride, self.inputs[order])
            if not count_frozen and not drawn.any() and not self._moved(name, numel, self.inputs[order]):
                still.add(name)
                continue
            found.append(drawn)
            total += numel
        return Surveyed(total, np.concatenate(found), frozenset(still))

    def _draw(self, name: str, numel: int, stride: int, expert: "Input") -> np.ndarray:
        assert self.blend.base is not None
        float_type = np.float64 if self.wide else np.float32
        compute = self.blend.compute(name)
        if name not in self._base_runs:
            self._base_runs[name] = _runs(self.blend.base, name, numel, stride).astype(compute, copy=False)
        with np.errstate(all="ignore"):
            drawn = (
                _runs(expert.weights, name, numel, stride).astype(compute, copy=False) - self._base_runs[name]
            )
            return np.abs(drawn).astype(float_type, copy=False).view(self.word)

    def _moved(self, name: str, numel: int, expert: "Input") -> bool:
        return any(bool(self._bits(span, expert).any()) for span in spans([(name, numel)], BLOCK))

    def _count(self, question: Count) -> dict[Key, Counted]:
        totals = {key: Counted.none(windows) for key, windows in question.windows.items()}
        asked: dict[str, list[Key]] = {}
        for key in question.windows:
            asked.setdefault(key[0], []).append(key)

        def work(span: Span) -> None:
            for key in asked[self.blend.group(span.name)]:
                if span.name not in question.still[key]:
                    self._count_span(span, self.inputs[key[1]], question.windows[key], totals[key])

        over = [span for group in asked for span in spans(self.groups.get(group, []), BLOCK)]
        run(work, over, self.blend.threads)
        return totals

    def _count_span(self, span: Span, expert: "Input", windows: tuple[Window, ...], total: Counted) -> None:
        lows, highs = (np.array(ends, self.word) for ends in zip(*((w.low, w.high) for w in windows)))
        chosen = self.scratch.take("chosen", len(windows) * span.size, self.word).reshape(len(windows), -1)
        if self._fits(span, expert):
            magnitudes = self._magnitudes(span, expert)
            below, found = magnitudes.sift(lows, highs, chosen)
            self._check(magnitudes, expert)
        else:
            bits = self._bits(span, expert)
            counts = [kernels.sift(bits, low, high, row) for low, high, row in zip(lows, highs, chosen)]
            below, found = np.array(counts).T
        with self.lock:
            for number, window in enumerate(windows):
                total.below[number] += int(below[number])
                shift = self.word.type(window.shift)
                kernels.tally(chosen[number, : found[number]], lows[number], shift, total.bins[number])

    def _fits(self, span: Span, expert: "Input") -> bool:
        assert self.blend.base is not None
        return not self.wide and fits((self.blend.base, expert.weights), span.name)

    def _magnitudes(self, span: Span, expert: "Input") -> Magnitudes:
        assert self.blend.base is not None
        return Magnitudes(self.blend.base, expert.weights, span)

    def _check(self, magnitudes: Magnitudes, expert: "Input") -> None:
        self.blend.refuse([order for order, bad in zip((0, expert.order), magnitudes.bad) if bad])

    def _bits(self, span: Span, expert: "Input") -> np.ndarray:
        """Bits of |tau| of a span."""
        if self._fits(span, expert):
            magnitudes, bits = self._magnitudes(span, expert), np.empty(span.size, np.uint32)
            magnitudes.write(bits)
            self._check(magnitudes, expert)
            return bits
        delta = np.subtract(self.blend.numbers(expert, span), self.blend.base_block(span))
        return np.abs(delta).astype(np.float64 if self.wide else np.float32, copy=False).view(self.word)


def _runs(weights: Checkpoint, name: str, numel: int, stride: int) -> np.ndarray:
    """Of every `stride` elements the first 16, as numbers."""
    raw, rows = weights.raw(name), numel // stride
    picked = raw[: rows * stride].reshape(rows, stride)[:, :RUN].reshape(-1)
    last = raw[rows * stride :] if stride == RUN else raw[rows * stride :][:RUN]
    return decode(np.concatenate([picked, last]), weights.tensors[name].kind)
