"""Answers questions about whole tensors from the files, span by span, before a merge starts.

A `Surveyor` answers the questions of `blocks.search`, and those for sums, for some tensors. Answers for different tensors add up;
this is all that a merge on several machines exchanges.

Invariant: sums are taken over grains of fixed size and added exactly, counts are integers, so no answer depends on blocks,
threads or machines.
"""

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

from merge_service.blocks import loops
from merge_service.blocks.device import Host
from merge_service.blocks.questions import (
    Answer,
    Count,
    Counted,
    Findings,
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
)
from merge_service.blocks.search import RUN, stride_of
from merge_service.blocks.spans import BLOCK as PRODUCTS_BLOCK
from merge_service.blocks.spans import GRAIN, Scratch, Span, dots, run, spans, totals
from merge_service.checkpoints.dtypes import decode
from merge_service.checkpoints.weights import Weights
from merge_service.engine.compute import Compute
from merge_service.engine.fused import Fused, Magnitudes, fits
from merge_service.engine.places import Places
from merge_service.engine.reader import Reader
from merge_service.engine.stream_state import StreamState
from merge_service.engine.task import Input, MergeTask
from merge_service.engine.whole import WholeTensor, on_one_thread
from merge_service.techniques.place import Place, State

BLOCK = 1 << 17
"""Elements per span of a counting pass: the base's elements stay in a core's cache while every expert is compared with them."""


class Blocks:
    """The task vectors of all experts over some elements, each read on first use.

    Implements `techniques.place.Seen`, by which a technique measures a quantity of its own.
    """

    def __init__(
        self,
        task: MergeTask,
        read: Callable[[int], np.ndarray],
        places: Mapping[int, Place],
        state: Callable[[], State],
    ) -> None:
        self.params, self.orders, self.place, self._state = task.params, list(places), places, state
        self.read, self._held, self._made = read, dict[int, np.ndarray](), dict[Any, Any]()

    def one(self, order: int) -> np.ndarray:
        """The task vector of the expert with this number."""
        if order not in self._held:
            self._held[order] = self.read(order)
        return self._held[order]

    @property
    def blocks(self) -> list[np.ndarray]:
        """The task vectors of all experts, in order."""
        return [self.one(order) for order in self.orders]

    @property
    def places(self) -> list[Place]:
        """The places of all experts, in order."""
        return list(self.place.values())

    @cached_property
    def held(self) -> State:
        """The state of the experts before these, empty where there were none."""
        return self._state()

    def once(self, function: Callable[[Any, Sequence[Any], Sequence[Place]], Any]) -> Any:
        """`function(np, blocks, places)`, computed once for all experts."""
        if function not in self._made:
            self._made[function] = function(np, self.blocks, self.places)
        return self._made[function]


class Surveyor:
    """Answers questions for `tensors` (name, number of elements) of a task, with `threads` threads, about its experts and those that a
    stream has `held` so far. `site` is where whole tensors are worked on."""

    def __init__(
        self,
        task: MergeTask,
        tensors: Iterable[tuple[str, int]],
        threads: int = 1,
        site: Host = Host(),
        held: StreamState | None = None,
    ) -> None:
        self.site, self.held = site, held
        self.task, self.reader, self.threads = task, Reader(task), threads
        self.scratch, self.lock = Scratch(), threading.Lock()
        self.tensors, self.groups = list(tensors), dict[str, list[tuple[str, int]]]()
        for name, numel in self.tensors:
            self.groups.setdefault(task.group(name), []).append((name, numel))
        self.inputs = {expert.order: expert for expert in task.inputs}
        self._base_runs: dict[str, np.ndarray] = {}

    def answer(self, question: Question) -> Answer:
        """The answer for these tensors."""
        if isinstance(question, Products):
            return Grams(self._grams())
        if isinstance(question, Sums):
            return self._sums(question)
        if question.quantity.tensors is not None:
            return self._of_tensors(question)
        if isinstance(question, Count):
            return self._count(question)
        found = run(partial(self._survey, question), question.keys, self.threads)
        return dict(zip(question.keys, found))

    def _survey(self, question: Survey, key: Key) -> Surveyed:
        (group, order), quantity = key, question.quantity
        stride = stride_of(self.task.group_sizes[group])
        found, still, total = [np.empty(0, quantity.word)], set(), 0
        for name, numel in self.groups.get(group, []):
            places = Places(self.task, quantity.given).all(Span(name, 0, numel))
            drawn_state = partial(self._draw_state, name, numel, stride)
            blocks = Blocks(self.task, partial(self._draw, name, numel, stride), places, drawn_state)
            with np.errstate(all="ignore"):
                drawn = self._measure(quantity, order, blocks)
            if not question.count_frozen and not drawn.any() and not self._moved(name, numel, order):
                still.add(name)
                continue
            found.append(quantity.words(drawn))
            total += numel
        return Surveyed(total, np.concatenate(found), frozenset(still))

    def _of_tensors(self, question: Survey | Count) -> Answer:
        """The same of a quantity of whole tensors, each of which is worked on once for all experts."""
        quantity, compute = question.quantity, Compute(self.task, question.quantity.given, self.site)
        keys = question.keys if isinstance(question, Survey) else tuple(question.windows)
        surveyed: dict[Key, Surveyed] = {key: Surveyed(0, np.empty(0, quantity.word)) for key in keys}
        counted = (
            {} if isinstance(question, Survey) else {k: Counted.none(w) for k, w in question.windows.items()}
        )

        def work(span: Span) -> list[tuple[Key, Surveyed]]:
            assert quantity.tensors is not None
            group = self.task.group(span.name)
            of_experts = quantity.tensors(WholeTensor(compute, span.name))
            drawn = []
            for order, values in zip(self.inputs, of_experts or ()):
                if (group, order) not in surveyed:
                    continue
                words = quantity.words(values)
                if isinstance(question, Survey):
                    sample = _picked(words, stride_of(self.task.group_sizes[group]))
                    drawn.append(((group, order), Surveyed(words.size, sample)))
                else:
                    self._sift(words, question.windows[group, order], counted[group, order])
            return drawn

        groups = {group for group, _ in keys}
        over = [Span(name, 0, numel) for group in groups for name, numel in self.groups.get(group, [])]
        over.sort(key=lambda span: -span.size)
        with on_one_thread():
            for part in run(work, over, self.threads):
                for key, one in part:
                    surveyed[key] = surveyed[key] + one
        return surveyed if isinstance(question, Survey) else counted

    def _draw(self, name: str, numel: int, stride: int, order: int) -> np.ndarray:
        """Runs of a task vector. Functions of an element's position take the runs for the tensor's beginning, which is still a
        fair sample.
        """
        assert self.task.base is not None
        compute = self.task.compute(name)
        if name not in self._base_runs:
            self._base_runs[name] = _runs(self.task.base, name, numel, stride).astype(compute, copy=False)
        theirs = _runs(self.inputs[order].weights, name, numel, stride)
        return theirs.astype(compute, copy=False) - self._base_runs[name]

    def _draw_state(self, name: str, numel: int, stride: int) -> State:
        """The same runs of what a stream holds."""
        if self.held is None:
            return {}
        return {
            role: _runs(self.held.checkpoint, f"{role}:{name}", numel, stride)
            for role in self.task.arrays(name)
        }

    def _moved(self, name: str, numel: int, order: int) -> bool:
        return any(bool(self._delta(span, order).any()) for span in spans([(name, numel)], BLOCK))

    def _count(self, question: Count) -> dict[Key, Counted]:
        totals = {key: Counted.none(windows) for key, windows in question.windows.items()}
        quantity = question.quantity
        plain = quantity.name == "magnitude" and not quantity.wide
        asked: dict[str, list[Key]] = {}
        for key in question.windows:
            asked.setdefault(key[0], []).append(key)
        tables = (
            {group: _Table(question, keys, self.inputs) for group, keys in asked.items()} if plain else {}
        )

        def work(span: Span) -> None:
            group = self.task.group(span.name)
            keys = [key for key in asked[group] if span.name not in question.still.get(key, ())]
            if plain and keys == asked[group] and all(self._fits(span, order) for _, order in keys):
                self._count_fused(span, tables[group])
                return
            blocks = self._blocks(span, quantity.given)
            for key in keys:
                self._count_span(span, blocks, key[1], question, question.windows[key], totals[key])

        block = BLOCK if plain else GRAIN  # others hold a block of every expert
        over = [span for group in asked for span in spans(self.groups.get(group, []), block)]
        run(work, over, self.threads)
        for table in tables.values():
            table.add_to(totals)
        return totals

    def _count_fused(self, span: Span, table: "_Table") -> None:
        assert self.task.base is not None
        magnitudes = Magnitudes(self.task.base, [expert.weights for expert in table.experts], span)
        windows = table.windows
        for below, chosen, owners in magnitudes.sift(windows, self.scratch):
            with self.lock:
                np.add(table.below, below, out=table.below)
                loops.tally(chosen, owners, windows, table.bins)
        self.reader.refuse([table.experts[row].order if row >= 0 else 0 for row in magnitudes.bad])

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
        self._sift(quantity.words(self._measure_span(quantity, span, order, blocks)), windows, total)

    def _sift(self, words: np.ndarray, windows: Sequence[Window], total: Counted) -> None:
        """Count numbers, as integers that keep their order, into windows."""
        word = words.dtype.type
        chosen = self.scratch.take("chosen", words.size, words.dtype)
        for number, window in enumerate(windows):
            below, found = loops.sift(words, window.low, window.high, chosen)
            places = ((chosen[:found] - word(window.low)) >> word(window.shift)).astype(np.intp)
            with self.lock:
                total.below[number] += below
                np.add.at(total.bins[number], places, 1)

    def _sums(self, question: Sums) -> Summed:
        given = question.quantities[0].given

        def work(span: Span) -> list[tuple[tuple[str, str, int], list[float]]]:
            blocks = self._blocks(span, given)
            return [
                ((quantity.name, span.name, order), totals(self._measure_span(quantity, span, order, blocks)))
                for order in self.inputs
                for quantity in question.quantities
            ]

        parts: dict[tuple[str, str, int], list[float]] = {}
        for found in run(work, spans(self.tensors, GRAIN), self.threads):
            for key, part in found:
                parts.setdefault(key, []).extend(part)
        return Summed(parts)

    def _measure_span(self, quantity: Quantity, span: Span, order: int, blocks: Blocks) -> np.ndarray:
        start = self.task.cover(span).start
        return self._measure(quantity, order, blocks)[span.start - start : span.stop - start]

    def _measure(self, quantity: Quantity, order: int, blocks: Blocks) -> np.ndarray:
        """A quantity of one expert, in the type in which it is ranked or summed."""
        if quantity.measure is not None:
            return quantity.measure(blocks, order)
        if quantity.name == "magnitude":
            return np.abs(blocks.one(order))
        assert quantity.name == "thinned", quantity.name
        return np.abs(self.task.thin.apply(np, blocks.one(order), blocks.place[order]))

    def _blocks(self, span: Span, given: Findings) -> Blocks:
        rows = self.task.cover(span)
        return Blocks(
            self.task,
            partial(self._delta, rows),
            Places(self.task, given).all(rows),
            partial(self._state, rows),
        )

    def _state(self, span: Span) -> State:
        return {} if self.held is None else self.held.read(span, self.task.arrays(span.name))

    def _delta(self, span: Span, order: int) -> np.ndarray:
        return self.reader.delta(self.inputs[order], span)

    def _fits(self, span: Span, order: int) -> bool:
        assert self.task.base is not None
        return fits((self.task.base, self.inputs[order].weights), span.name)

    def _grams(self) -> dict[str, np.ndarray]:
        """Inner products of all pairs of inputs per tensor, float64 [inputs, inputs], of task vectors if those are merged."""
        task, fused = self.task, Fused.of(self.task)

        def work(span: Span) -> np.ndarray:
            if fused is not None and fused.fits(span.name):
                found, bad = fused.products(span)
                self.reader.refuse(bad)
                return found
            read = self.reader.delta if task.moves else self.reader.numbers
            blocks = [read(expert, span) for expert in task.inputs]
            pairs = [[dots(a, b, self.scratch) for b in blocks] for a in blocks]
            return np.array(pairs).transpose(2, 0, 1)

        parts: dict[str, list[np.ndarray]] = {name: [] for name, _ in self.tensors}
        over = list(spans(self.tensors, PRODUCTS_BLOCK))
        for span, found in zip(over, run(work, over, self.threads)):
            parts[span.name].extend(found)
        return {name: _exact_sum(found) for name, found in parts.items()}


def _exact_sum(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The symmetric matrix whose upper triangle is the sum of `parts`, each entry rounded once."""
    size = len(parts[0])
    gram = np.empty((size, size))
    for i in range(size):
        for j in range(i, size):
            gram[i, j] = gram[j, i] = math.fsum(part[i, j] for part in parts)
    return gram


class _Table:
    """The windows of one group for the fused loop, and what was counted in them."""

    def __init__(self, question: Count, keys: Sequence[Key], inputs: Mapping[int, Input]) -> None:
        self.keys = keys
        self.experts = [inputs[order] for _, order in keys]
        flat = [(row, window) for row, key in enumerate(keys) for window in question.windows[key]]
        word, sizes = question.quantity.word, [window.bins for _, window in flat]
        self.windows = loops.Windows(
            lows=np.array([window.low for _, window in flat], word),
            highs=np.array([window.high for _, window in flat], word),
            shifts=np.array([window.shift for _, window in flat], word),
            rows=np.array([row for row, _ in flat], np.int64),
            starts=np.cumsum([0, *sizes[:-1]], dtype=np.int64),
        )
        self.below, self.bins = np.zeros(len(flat), np.int64), np.zeros(sum(sizes), np.int64)

    def add_to(self, totals: Mapping[Key, Counted]) -> None:
        """Add the counts to those of every group and expert."""
        place = 0
        for key in self.keys:
            total = totals[key]
            for number, bins in enumerate(total.bins):
                start = int(self.windows.starts[place])
                total.below[number] += int(self.below[place])
                bins += self.bins[start : start + bins.size]
                place += 1


def _runs(weights: Weights, name: str, numel: int, stride: int) -> np.ndarray:
    """The first 16 of every `stride` elements, as numbers."""
    return decode(_picked(weights.raw(name), stride), weights.tensors[name].kind)


def _picked(raw: np.ndarray, stride: int) -> np.ndarray:
    rows = raw.size // stride
    picked = raw[: rows * stride].reshape(rows, stride)[:, :RUN].reshape(-1)
    last = raw[rows * stride :] if stride == RUN else raw[rows * stride :][:RUN]
    return np.concatenate([picked, last])
