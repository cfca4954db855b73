"""The search for the number at a rank: exact from any first window."""

import numpy as np
import pytest

from merge_service.blocks.questions import Window
from merge_service.blocks.search import _Quest

VALUES = np.array([0, 0, 3, 3, 3, 4, 9, 17, 17, 30])
TOP = 31


@pytest.mark.parametrize("most", [1, 4, 64])
@pytest.mark.parametrize("rank", range(1, len(VALUES) + 1))
def test_rank_is_found_from_every_window_whatever_side_it_missed(rank: int, most: int) -> None:
    """The window may lie below, above, around or right beside the value: the rank can be the last below it or the first above."""
    for low in range(TOP + 1):
        for high in range(low, TOP + 1):
            quest, rounds = _Quest(rank, Window.of(low, high, most), max(most, 4)), 0
            while quest.value is None:
                window, rounds = quest.window, rounds + 1
                assert rounds < 20 and window.low <= window.high
                inside = VALUES[(window.low <= VALUES) & (window.high >= VALUES)]
                bins = np.bincount((inside - window.low) >> window.shift, minlength=window.bins)
                quest.learn(int((window.low > VALUES).sum()), bins, TOP)
            assert quest.value == np.sort(VALUES)[rank - 1]
