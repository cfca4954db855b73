"""Which bytes a merge reads before it writes a block: its own questions about whole tensors, asked and answered without a number.

A technique's `prepare` runs as it will. Its questions are counted by the bytes that answering them reads, and answered as a search finds
them answered that hits at once: a sample, and one pass that counts.

Invariant: what is counted follows from headers and parameters alone.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from merge_service.blocks.questions import (
    Answer,
    Count,
    Counted,
    Grams,
    Products,
    Question,
    Summed,
    Sums,
    Survey,
    Surveyed,
)
from merge_service.blocks.search import RUN, stride_of
from merge_service.engine.prepare import prepare
from merge_service.engine.task import MergeTask

PAGE = 4096
"""Bytes that a storage reads at least."""
_SAMPLE = 1000


def asked(task: MergeTask) -> dict[str, int]:
    """Bytes that are read for statistics of whole tensors, by what they are for; nothing for a merge that needs none beforehand."""
    if task.in_turn or not task.inputs:
        return {}
    recorder = _Recorder(task)
    prepare(task, recorder.answer)
    return dict(recorder.read)


class _Parts(dict[Any, list[float]]):
    def __missing__(self, key: Any) -> list[float]:
        return [1.0]


class _Recorder:
    """Counts the bytes of questions."""

    def __init__(self, task: MergeTask) -> None:
        self.task, self.read = task, Counter[str]()
        self.groups: dict[str, list[str]] = {}
        for name, _ in task.combined:
            self.groups.setdefault(task.group(name), []).append(name)

    def answer(self, question: Question) -> Answer:
        """An answer without a number that was read."""
        orders = self.task.orders
        if isinstance(question, Products):
            self.read["inner products"] += sum(self._size(group, orders) for group in self.groups)
            return Grams({name: np.eye(len(orders)) for name, _ in self.task.combined})
        if isinstance(question, Sums):
            self.read["sums"] += sum(self._size(group, orders) for group in self.groups)
            return Summed(_Parts())
        keys = question.keys if isinstance(question, Survey) else tuple(question.windows)
        every = question.quantity.tensors is not None or question.quantity.measure is not None
        by_group: dict[str, list[int]] = {}
        for group, order in keys:
            by_group.setdefault(group, []).append(order)
        if isinstance(question, Count):
            self.read["thresholds"] += sum(self._size(g, orders if every else o) for g, o in by_group.items())
            return {key: _settled(self.task, key[0], question) for key in keys}
        for group, some in by_group.items():
            part = 1.0 if question.quantity.tensors else _part(self.task.group_sizes[group])
            self.read["sample"] += int(part * self._size(group, orders if every else some))
        word = question.quantity.word
        sizes = {key: self.task.group_sizes[key[0]] for key in keys}
        whole = {
            key: size if stride_of(size) == RUN else min(size - 1, _SAMPLE) for key, size in sizes.items()
        }
        return {key: Surveyed(sizes[key], np.zeros(whole[key], word)) for key in keys}

    def _size(self, group: str, orders: Iterable[int]) -> int:
        """Bytes of a group in the base and these experts."""
        some = set(orders)
        inputs = [one.weights for one in self.task.inputs if not some or one.order in some]
        if self.task.moves and self.task.base is not None:
            inputs.append(self.task.base)
        return sum(
            one.tensors[name].nbytes for one in inputs for name in self.groups[group] if name in one.tensors
        )


def _part(size: int) -> float:
    """The part of a tensor's bytes that drawing a sample reads."""
    stride = stride_of(size)
    return 1.0 if stride == RUN else min(1.0, PAGE / (2.0 * stride))


def _settled(task: MergeTask, group: str, question: Count) -> Counted:
    """What ends a search: all of a group in the first number of every window."""
    key = next(one for one in question.windows if one[0] == group)
    found = Counted.none(question.windows[key])
    for bins in found.bins:
        bins[0] = task.group_sizes[group]
    return found
