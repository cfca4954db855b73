"""How an adapter changes one tensor: a low-rank product, rescaled rows (DoRA), a shift, new rows, or another tensor in its place.

A tensor is seen as a matrix [rows, columns] in the order in which it is stored. An update makes some of its rows from the same rows
of the base, in float32 (float64 if the base is).

Invariant: a group of rows is always made whole and by products of the same shape, so the bits of a row depend on neither the span
that asks for it nor the thread.
"""

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

GROUP = 1 << 16
"""Elements of a tensor that are made at a time, in whole rows."""

Form = Literal["linear", "transposed", "embedding"]
"""Of a tensor [out, in]; of one that is stored [in, out]; of an embedding."""
Rows = Callable[[int, int], np.ndarray]
"""Rows first..last of the tensor before the update, [rows, columns]."""


class Factor(Protocol):
    """A matrix that is read when it is needed: the file holds it, not the memory."""

    def __call__(self) -> np.ndarray: ...


class Update(Protocol):
    """A change of one tensor, a matrix."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    def rows(self, before: Rows, first: int, last: int) -> np.ndarray:
        """Rows first..last after the update."""


@dataclass(frozen=True)
class Copy:
    """Another tensor in the place of the base's."""

    shape: tuple[int, int]
    read: Rows

    def rows(self, before: Rows, first: int, last: int) -> np.ndarray:
        """As of `Update`."""
        return self.read(first, last)


@dataclass(frozen=True)
class Patch:
    """New rows at some places, as an adapter has them for tokens that it trained."""

    shape: tuple[int, int]
    at: tuple[int, ...]
    values: Factor

    def rows(self, before: Rows, first: int, last: int) -> np.ndarray:
        """As of `Update`."""
        made = before(first, last).copy()
        chosen = [(row - first, place) for place, row in enumerate(self.at) if first <= row < last]
        if chosen:
            values = self.values()
            for row, place in chosen:
                made[row] = values[place]
        return made


@dataclass(frozen=True)
class LowRank:
    """scale * left @ right added to the base: `left` is [rows, r], `right` [r, columns] (LoRA, arXiv 2106.09685, eq. 3). `form` says how
    a file writes the two.
    """

    shape: tuple[int, int]
    left: Factor
    right: Factor
    scale: float
    form: Form = "linear"

    def rows(self, before: Rows, first: int, last: int) -> np.ndarray:
        """As of `Update`."""
        base = before(first, last)
        made = self.delta(first, last).astype(base.dtype, copy=False)
        return np.add(made, base, out=made)

    def delta(self, first: int, last: int) -> np.ndarray:
        """Rows first..last of what is added, float64: sums of factors on a grid (`on_grid`) are exact, so no library decides a bit."""
        left, right = self.factors()
        made = left[first:last] @ right
        return np.multiply(made, self.scale, out=made)

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Both factors, float64; a thread keeps those that it read last."""
        held: tuple[LowRank, np.ndarray, np.ndarray] | None = getattr(_LAST, "factors", None)
        if held is None or held[0] is not self:
            left, right = (np.ascontiguousarray(one(), np.float64) for one in (self.left, self.right))
            held = (self, left, right)
            _LAST.factors = held
        return held[1], held[2]


@dataclass(frozen=True)
class Dora:
    """m * (W + dW) / |W + dW| with the norm of each row, or of each column of a matrix that is stored transposed (DoRA, arXiv
    2402.09353, eq. 5).
    """

    inner: LowRank
    magnitude: Factor
    by_row: bool
    _columns: dict[str, np.ndarray] = field(default_factory=dict, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False)

    @property
    def shape(self) -> tuple[int, int]:
        """That of the tensor."""
        return self.inner.shape

    def rows(self, before: Rows, first: int, last: int) -> np.ndarray:
        """As of `Update`."""
        made = self.inner.rows(before, first, last)
        if self.by_row:
            factor = self.magnitude()[first:last] / _norms(made, 1)
            return np.multiply(made, factor[:, None].astype(made.dtype), out=made)
        return np.multiply(made, self._factor(before).astype(made.dtype), out=made)

    def _factor(self, before: Rows) -> np.ndarray:
        """m / |W + dW| of every column; reads the tensor once more."""
        with self._lock:
            if "factor" not in self._columns:
                total = np.zeros(self.shape[1])
                for first, last in groups(self.shape):
                    total += _norms(self.inner.rows(before, first, last), 0) ** 2
                self._columns["factor"] = self.magnitude() / np.sqrt(total)
            return self._columns["factor"]


_LAST = threading.local()


def on_grid(factor: np.ndarray, rank: int) -> np.ndarray:
    """A factor rounded to whole multiples of a power of two, at most 2^22 of them, fewer above rank 512. Products of two such factors, and
    sums of `rank` of them, are exact in float64, in whatever order and with whichever instructions a library adds them.
    """
    bits = min(22, (53 - math.ceil(math.log2(rank))) // 2)
    largest = float(np.abs(factor).max(initial=0.0))
    if not 0 < largest < math.inf:
        return factor
    step = math.ldexp(1.0, math.frexp(largest)[1] - bits)
    made: np.ndarray = np.round(factor.astype(np.float64) / step) * step
    return made.astype(np.float32)


def groups(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """First and last row of every group of a matrix."""
    step = group_of(shape)
    return [(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]


def group_of(shape: tuple[int, int]) -> int:
    """Rows of a group."""
    return max(1, GROUP // max(1, shape[1]))


def _norms(matrix: np.ndarray, axis: int) -> np.ndarray:
    return np.sqrt(np.sum(np.square(matrix, dtype=np.float64), axis=axis))


Updates = Mapping[str, Update]
