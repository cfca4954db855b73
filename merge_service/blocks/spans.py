"""Runs one function on every block of a model, on threads.

Techniques are elementwise once a few numbers per tensor are known. A model is therefore cut into blocks that fit the cache, and a
block is finished before the next begins: memory is a few blocks per thread, for any size of model and any number of experts.

Invariant: results do not depend on the block size or the thread count, bit for bit. Elementwise work cannot depend on them. Sums
are taken over grains of fixed size and added exactly (`math.fsum`); no other reduction is allowed here.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

GRAIN = 1 << 16
"""Elements of one partial sum; a block is a whole number of grains."""
BLOCK = 1 << 18
"""Default elements per span: enough that starting a span costs little."""

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Span:
    """Elements start..stop of one flattened tensor."""

    name: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start


class Scratch(threading.local):
    """Buffers that a thread reuses for every block, so that blocks need no allocation."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, np.dtype], np.ndarray] = {}

    def take(self, role: str, size: int, dtype: np.dtype | type) -> np.ndarray:
        """`size` elements of `dtype`, uninitialised; the same memory for the same role."""
        dtype = np.dtype(dtype)
        held = self._buffers.get((role, dtype))
        if held is None or held.size < size:
            held = self._buffers[role, dtype] = np.empty(size, dtype)
        return held[:size]


def spans(sizes: Iterable[tuple[str, int]], block: int, first: int = 0) -> Iterator[Span]:
    """Cut tensors (name, number of elements) into spans of at most `block` elements, a whole number of grains; from element `first` on."""
    if block < 1:
        raise ValueError(f"block must be at least 1 element, not {block}")
    step = -(-block // GRAIN) * GRAIN
    for name, numel in sizes:
        for start in range(first, numel, step):
            yield Span(name, start, min(start + step, numel))


def run(work: Callable[[U], T], over: Iterable[U], threads: int) -> list[T]:
    """Results of `work` for every span, in order. The first failure in order is raised; later spans are dropped."""
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")

    def quiet(span: U) -> T:
        with np.errstate(all="ignore"):  # overflow is found by its result, not by a warning
            return work(span)

    if threads == 1:
        return [quiet(span) for span in over]
    with ThreadPoolExecutor(threads, thread_name_prefix="merge") as pool:
        futures = [pool.submit(quiet, span) for span in over]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def totals(values: np.ndarray) -> list[float]:
    """Partial sums in float64, one per grain; the block they come from must start at a whole grain."""
    starts = range(0, values.size, GRAIN)
    return [float(np.add.reduce(values[start : start + GRAIN], dtype=np.float64)) for start in starts]


def dots(a: np.ndarray, b: np.ndarray, scratch: Scratch) -> list[float]:
    """Partial sums of a*b in float64, one per grain; the block they come from must start at a whole grain."""
    parts = []
    for start in range(0, a.size, GRAIN):
        left = scratch.take("left", min(GRAIN, a.size - start), np.float64)
        np.copyto(left, a[start : start + GRAIN])
        right = left
        if b is not a:
            right = scratch.take("right", left.size, np.float64)
            np.copyto(right, b[start : start + GRAIN])
        parts.append(float(np.add.reduce(np.multiply(left, right, out=left))))
    return parts
