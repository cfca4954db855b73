"""The exact k-th smallest magnitude of a task vector, without sorting it or holding it in memory.

Magnitudes of floats, read as unsigned integers, keep their order. Signed numbers do so after a change of bits, so any quantity
can be ranked. A sample bounds the wanted rank by two values. One pass counts what lies below them and how often each value
between them occurs, which gives the answer. If the sample was wrong, the search continues in the part that was missed, so the
result is exact for any sample.

Invariant: exact, and independent of blocks, threads, machines and the sample.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge_service.blocks.questions import (
    Ask,
    Count,
    Key,
    Quantity,
    Ranks,
    Survey,
    Surveyed,
    Thresholds,
    Window,
)

if TYPE_CHECKING:
    import numpy as np

BINS = 1 << 20
"""Most values distinguished in one pass over one window (8 MiB of counts)."""
COUNTS = 1 << 22
"""Most bins at a time over all windows (32 MiB)."""
SAMPLE = 1 << 20
"""About how many elements of a group are drawn."""
SURVEYS = 4
"""Groups that are surveyed at a time, which limits the memory for samples."""
GATHER = 1 << 16
"""Groups up to this many elements are drawn whole; their ranks need no pass."""


@dataclass
class _Quest:
    """The search for one rank of one group."""

    rank: int
    window: Window
    most: int
    value: int | None = None

    def learn(self, below: int, bins: "np.ndarray", top: int) -> None:
        """Narrow the window by what was counted in it, or move it to where the rank must be."""
        import numpy as np

        inside = int(bins.sum())
        if self.rank <= below:
            self.window = Window.of(0, self.window.low - 1, self.most)
        elif self.rank > below + inside:
            self.window = Window.of(self.window.high + 1, top, self.most)
        else:
            before = np.cumsum(bins)
            chosen = int(np.searchsorted(before, self.rank - below))
            low = self.window.low + (chosen << self.window.shift)
            if self.window.shift == 0:
                self.value = low
            else:
                high = min(low + (1 << self.window.shift) - 1, self.window.high)
                self.window = Window.of(low, high, self.most)


def search(
    ranks: Mapping[Key, Ranks], ask: Ask, quantity: Quantity, *, count_frozen: bool
) -> dict[Key, Thresholds]:
    """The numbers at these ranks for every group and expert. `ask` answers one question for all tensors."""
    top, most = quantity.top, _fineness(quantity, len(ranks))
    quests: dict[Key, list[_Quest | None]] = {}
    still: dict[Key, frozenset[str]] = {}
    keys = tuple(ranks)
    at_once = len(keys) if quantity.tensors else SURVEYS  # a whole tensor is worked on once for all experts
    for first in range(0, len(keys), at_once or 1):
        surveys: Any = ask(Survey(keys[first : first + at_once], count_frozen, quantity))
        for key, survey in surveys.items():
            quests[key] = [_quest(rank, survey, top, most) for rank in ranks[key](survey.total)]
            still[key] = survey.still
    while unsettled := _next_round(quests):
        windows = {key: tuple(quest.window for quest in found) for key, found in unsettled.items()}
        counted: Any = ask(Count(windows, {key: still[key] for key in windows}, quantity))
        for key, found in unsettled.items():
            for quest, below, bins in zip(found, counted[key].below, counted[key].bins):
                quest.learn(below, bins, top)

    def number(quest: _Quest | None, otherwise: float) -> float:
        if quest is None or quest.value is None:
            return otherwise
        return quantity.number(quest.value)

    return {key: Thresholds(number(low, 0.0), number(high, math.inf)) for key, (low, high) in quests.items()}


def _next_round(quests: Mapping[Key, list[_Quest | None]]) -> dict[Key, list[_Quest]]:
    """The searches to continue in one pass: as many as `COUNTS` allows, so that memory does not grow with the number of experts."""
    chosen: dict[Key, list[_Quest]] = {}
    held = 0
    for key, found in quests.items():
        unsettled = [quest for quest in found if quest is not None and quest.value is None]
        held += sum(quest.window.bins for quest in unsettled)
        if chosen and held > COUNTS:
            break
        if unsettled:
            chosen[key] = unsettled
    return chosen


def _fineness(quantity: Quantity, groups: int) -> int:
    """Bins per window. Coarse windows take more passes each, but every group of a joint quantity takes part in each pass."""
    if not quantity.joint:
        return BINS
    return 1 << max(min(BINS, COUNTS // (2 * max(groups, 1))), 256).bit_length() - 1


def _quest(rank: int | None, survey: Surveyed, top: int, most: int) -> _Quest | None:
    """The first window of a search: the sample's quantile, plus and minus 6 standard errors."""
    import numpy as np

    if rank is None:
        return None
    size = survey.sample.size
    if size == survey.total:
        value = int(np.partition(survey.sample, rank - 1)[rank - 1])
        return _Quest(rank, Window(value, value, 0), most, value)
    if size < 256:
        return _Quest(rank, Window.of(0, top, most), most)
    share = rank / survey.total
    slack = 6 * math.sqrt(size * share * (1 - share)) + 32
    low, high = int(max(share * size - slack, 0)), int(min(share * size + slack, size - 1))
    parted = np.partition(survey.sample, (low, high))
    first = 0 if low == 0 else int(parted[low])
    last = top if high == size - 1 else int(parted[high])
    return _Quest(rank, Window.of(first, last, most), most)


def stride_of(total: int) -> int:
    """Elements per run of the sample: of every `stride` elements a run of 16 is drawn; 16 draws everything.

    Prime, so that runs do not fall on the same columns of a matrix again and again.
    """
    if total <= GATHER:
        return RUN
    wanted = max(total * RUN // SAMPLE, 3 * RUN)
    return next(prime for prime in _PRIMES if prime >= min(wanted, _PRIMES[-1]))


RUN = 16
_PRIMES = (53, 61, 127, 251, 509, 1021, 2039, 4093, 8191, 16381, 32749)
