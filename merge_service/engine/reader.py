"""Blocks of a merge's checkpoints, as numbers that are known to be finite.

Invariant: NaN and infinity never reach a rule; the error names the checkpoint, its tensors and the number of such values.
"""

from collections.abc import Sequence

import numpy as np

from merge_service.blocks.spans import Span
from merge_service.checkpoints.admission import check_finite
from merge_service.checkpoints.dtypes import all_finite
from merge_service.checkpoints.weights import Weights
from merge_service.engine.task import Input, MergeTask


class Reader:
    """Reads blocks of one merge, in the type of sums."""

    def __init__(self, task: MergeTask) -> None:
        self.task = task

    def base(self, span: Span) -> np.ndarray:
        """The base's numbers. Raises `NonFiniteCheckpoint`."""
        assert self.task.base is not None
        return self._block(self.task.base, span, 0)

    def numbers(self, expert: Input, span: Span) -> np.ndarray:
        """An expert's numbers. Raises `NonFiniteCheckpoint`."""
        return self._block(expert.weights, span, expert.order)

    def delta(self, expert: Input, span: Span) -> np.ndarray:
        """An expert's task vector. Raises `NonFiniteCheckpoint`."""
        return np.subtract(self.numbers(expert, span), self.base(span))

    def refuse(self, orders: Sequence[int]) -> None:
        """Raise `NonFiniteCheckpoint` for the first of these inputs (0 is the base) that holds NaN or infinity."""
        for order in orders:
            if order == 0 and self.task.base is not None:
                check_finite(self.task.base, "the base")
            for expert in self.task.inputs:
                if expert.order == order:
                    check_finite(expert.weights, expert.id)

    def _block(self, weights: Weights, span: Span, order: int) -> np.ndarray:
        block = weights.read(span.name, span.start, span.stop)
        if not all_finite(block):
            self.refuse((order,))
        return block.astype(self.task.compute(span.name), copy=False)
