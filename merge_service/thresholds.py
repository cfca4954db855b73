"""The exact k-th smallest magnitude of a task vector, without sorting it or holding it in memory.

Magnitudes of floats, read as unsigned integers, keep their order. A histogram of the leading 16 bits finds the bin that
holds the wanted rank, further ones over the remaining bits find the value itself. Histograms add up, so blocks, threads
and (later) machines may count apart.

Invariant: exact, and independent of blocks and threads.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from merge_service.engine import Scratch, Span, run, spans

SMALL = 1 << 20
"""Groups up to this many elements are gathered and selected from directly."""
BLOCK = 1 << 17
"""Elements per block of a counting pass; larger than elsewhere, since each block makes a histogram of its own."""

Magnitudes = Callable[[Span], np.ndarray]
Ranks = Callable[[int], tuple[int | None, int | None]]


def trim_ranks(density: float) -> Ranks:
    """TIES: keep |tau| >= the int((1 - density) * n)-th smallest; with nothing to drop, everything.

    The convention of ties-merging and TIME: one more than density * n is kept, and all that tie with the threshold.
    """

    def ranks(n: int) -> tuple[int | None, int | None]:
        return _portion(1 - _exact(density), n) or None, None

    return ranks


def band_ranks(density: float, outliers: float) -> Ranks:
    """Breadcrumbs in TIME's convention: without ties exactly n - bottom - top are kept, thresholds included."""

    def ranks(n: int) -> tuple[int | None, int | None]:
        bottom = _portion(max(1 - _exact(density) - _exact(outliers), Fraction(0)), n)
        top = _portion(_exact(outliers), n)
        return (bottom + 1 if bottom else None), (n - top if top else None)

    return ranks


@dataclass(frozen=True)
class Limits:
    """Magnitudes from `low` to `high`, both included, are kept."""

    low: float = 0.0
    high: float = float("inf")


EVERYTHING = Limits()


def limits(
    sizes: list[tuple[str, int]],
    magnitudes: Magnitudes,
    ranks: Ranks,
    *,
    count_frozen: bool,
    threads: int,
    wide: bool,
) -> Limits:
    """The limits over one group of tensors (name, number of elements).

    `magnitudes` gives |tau| of a span. Without `count_frozen`, tensors that are zero throughout count for nothing.
    `wide` says that some magnitudes are float64.
    """
    total = sum(numel for _, numel in sizes)
    if count_frozen and ranks(total) == (None, None):
        return EVERYTHING
    if total <= SMALL:
        return _gathered(sizes, magnitudes, ranks, count_frozen, wide)
    return _Counting(sizes, magnitudes, count_frozen, threads, wide).limits(ranks)


def _exact(number: float) -> Fraction:
    """The decimal a person wrote: 0.9 is nine tenths, not the nearest binary fraction."""
    return Fraction(repr(float(number)))


def _portion(fraction: Fraction, n: int) -> int:
    return int(fraction * n)


def _limits(found: list[float | None]) -> Limits:
    low, high = found
    return Limits(0.0 if low is None else low, float("inf") if high is None else high)


def _gathered(
    sizes: list[tuple[str, int]], magnitudes: Magnitudes, ranks: Ranks, count_frozen: bool, wide: bool
) -> Limits:
    parts: list[np.ndarray] = []
    for name, numel in sizes:
        whole = [
            magnitudes(span).astype(np.float64 if wide else np.float32)
            for span in spans([(name, numel)], BLOCK)
        ]
        if count_frozen or any(part.any() for part in whole):
            parts += whole
    values = np.concatenate(parts) if parts else np.empty(0, np.float32)
    wanted = ranks(values.size)
    at = sorted({rank - 1 for rank in wanted if rank is not None})
    if at:
        values.partition(at)
    return _limits([None if rank is None else float(values[rank - 1]) for rank in wanted])


class _Counting:
    """Radix selection over passes of at most 16 bits."""

    def __init__(
        self,
        sizes: list[tuple[str, int]],
        magnitudes: Magnitudes,
        count_frozen: bool,
        threads: int,
        wide: bool,
    ) -> None:
        self.sizes, self.magnitudes, self.count_frozen, self.threads = (
            sizes,
            magnitudes,
            count_frozen,
            threads,
        )
        self.float = np.dtype(np.float64 if wide else np.float32)
        self.word = np.dtype(np.uint64 if wide else np.uint32)
        self.digits = (16, 16, 16, 15) if wide else (16, 15)
        self.scratch, self.lock = Scratch(), threading.Lock()

    def limits(self, ranks: Ranks) -> Limits:
        first = self._first_pass()
        found = []
        for rank in ranks(int(first.sum())):
            found.append(None if rank is None else self._value(first, rank))
        return _limits(found)

    def _first_pass(self) -> np.ndarray:
        """The histogram of the leading digit; forgets tensors that are zero throughout unless they count."""
        shift = sum(self.digits[1:])
        counts = np.zeros(1 << self.digits[0], np.int64)
        moved: set[str] = set()

        def work(span: Span) -> None:
            bits = self._bits(span)
            part = np.bincount(self._top(bits, shift), minlength=counts.size)
            alive = not self.count_frozen and bool(bits.any())
            with self.lock:
                np.add(counts, part, out=counts)
                if alive:
                    moved.add(span.name)

        run(work, spans(self.sizes, BLOCK), self.threads)
        if not self.count_frozen:
            counts[0] -= sum(numel for name, numel in self.sizes if name not in moved)
            self.sizes = [(name, numel) for name, numel in self.sizes if name in moved]
        return counts

    def _value(self, counts: np.ndarray, rank: int) -> float:
        """The rank-th smallest magnitude (1-based), digit by digit."""
        shift, prefix = sum(self.digits), 0
        for number, digit in enumerate(self.digits):
            if number:
                counts = self._next_pass(prefix, shift, digit)
            below = np.cumsum(counts)
            chosen = int(np.searchsorted(below, rank))
            rank -= int(below[chosen - 1]) if chosen else 0
            prefix, shift = (prefix << digit) | chosen, shift - digit
        return float(np.array(prefix, self.word).view(self.float))

    def _next_pass(self, prefix: int, shift: int, digit: int) -> np.ndarray:
        """The histogram of the next digit among magnitudes whose leading bits are `prefix`."""
        counts = np.zeros(1 << digit, np.int64)
        low, high = self.word.type(prefix << shift), self.word.type(((prefix + 1) << shift) - 1)

        def work(span: Span) -> None:
            bits = self._bits(span)
            inside = bits[(bits >= low) & (bits <= high)]
            if inside.size:
                digits = (inside >> self.word.type(shift - digit)) & self.word.type((1 << digit) - 1)
                part = np.bincount(digits.astype(np.intp), minlength=counts.size)
                with self.lock:
                    np.add(counts, part, out=counts)

        run(work, spans(self.sizes, BLOCK), self.threads)
        return counts

    def _bits(self, span: Span) -> np.ndarray:
        return self.magnitudes(span).astype(self.float, copy=False).view(self.word)

    def _top(self, bits: np.ndarray, shift: int) -> np.ndarray:
        out = self.scratch.take("top", bits.size, np.intp)
        np.right_shift(bits, self.word.type(shift), out=out, casting="unsafe")
        return out
