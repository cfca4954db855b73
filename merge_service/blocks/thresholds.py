"""The exact k-th smallest magnitude of a task vector, without sorting it or holding it in memory.

Magnitudes of floats, read as unsigned integers, keep their order, and with a sign they do after a change of bits, so any
quantity will do in place of magnitudes. A sample says between which two values the wanted rank
must lie; one pass counts what is below and how often each value between occurs, which settles it. Where the sample was wrong
the search goes on in the part that was missed, so the answer is exact whatever was drawn. Counts add up: blocks, threads and
machines count apart, and what is asked of them (`Survey`, `Count`, `Sums`) and answered are plain values.

Invariant: exact, and independent of blocks, threads, machines and the sample.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

Ranks = Callable[[int], tuple[int | None, int | None]]
Key = tuple[str, int]
"""A group of tensors and the number of an expert."""

BINS = 1 << 20
"""Most values told apart in one pass over one window (8 MiB of counts)."""
COUNTS = 1 << 22
"""Most bins at a time over all windows (32 MiB)."""
SAMPLE = 1 << 20
"""About how many elements of a group are drawn."""
SURVEYS = 4
"""Groups that are surveyed at a time, so that samples do not add up."""
GATHER = 1 << 16
"""Groups up to this many elements are drawn whole, which settles them without a pass."""


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


def crumb_ranks(density: float, outliers: float) -> Ranks:
    """Breadcrumbs as released and in MergeKit: without the int(outliers * n) largest, the int(density * n) largest.

    One at least is kept, where the released code keeps nothing and MergeKit loses the whole tensor (outliers * n < 1).
    """

    def ranks(n: int) -> tuple[int | None, int | None]:
        top, keep = _portion(_exact(outliers), n), max(_portion(_exact(density), n), 1)
        bottom = n - top - keep
        return (bottom + 1 if bottom > 0 else None), (n - top if top else None)

    return ranks


def clamp_ranks(winsorize: float) -> Ranks:
    """PCB (pcb-merging.py): the smallest and the largest magnitude that stay; one large value at least is clamped."""

    def ranks(n: int) -> tuple[int | None, int | None]:
        bottom = _portion(_exact(winsorize), n)
        return bottom + 1, max(int(n * (1 - _exact(winsorize)) - 1), bottom) + 1

    return ranks


def score_ranks(density: float) -> Ranks:
    """PCB: the score that counts for nothing, and the largest."""

    def ranks(n: int) -> tuple[int | None, int | None]:
        return min(_portion(1 - _exact(density), n), n - 1) + 1, n

    return ranks


def differing_ranks(density: float, zeros: int) -> Ranks:
    """SCE: the int(density * m)-th largest of the m values that are not zero, one at least; without any, no limit."""

    def ranks(n: int) -> tuple[int | None, int | None]:
        keep = max(_portion(_exact(density), n - zeros), 1)
        return (n - keep + 1 if n > zeros else None), None

    return ranks


@dataclass(frozen=True)
class Limits:
    """Magnitudes from `low` to `high`, both included, are kept."""

    low: float = 0.0
    high: float = float("inf")


EVERYTHING = Limits()


@dataclass(frozen=True)
class Window:
    """Magnitudes whose bits lie in low..high, counted in bins of 2^shift values."""

    low: int
    high: int
    shift: int

    @property
    def bins(self) -> int:
        """Number of bins."""
        return ((self.high - self.low) >> self.shift) + 1

    @classmethod
    def of(cls, low: int, high: int, most: int) -> "Window":
        """As fine as `most` bins (a power of two) allow."""
        return cls(low, high, max(0, (high - low).bit_length() - (most.bit_length() - 1)))


@dataclass(frozen=True)
class Quantity:
    """What is ranked: a name that `Surveyor` knows, and the form of its numbers (`wide`: float64, `signed`: also below zero).

    A `joint` one is made of all experts' blocks, so that its groups are best counted all in one pass. `given` holds what it
    depends on and was found before (`Blend.findings`).
    """

    name: str = "magnitude"
    wide: bool = False
    signed: bool = False
    joint: bool = False
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def word(self) -> np.dtype:
        """The unsigned integers that keep the order of its numbers."""
        return np.dtype(np.uint64 if self.wide else np.uint32)

    def words(self, values: np.ndarray) -> np.ndarray:
        """Numbers as such integers."""
        values = np.ascontiguousarray(values, np.float64 if self.wide else np.float32)
        bits = values.view(self.word)
        if not self.signed:
            return bits
        sign = self.word.type(1 << (8 * self.word.itemsize - 1))
        return np.where(bits & sign, ~bits, bits | sign)

    def number(self, word: int) -> float:
        """The number of an integer."""
        if self.signed:
            sign = 1 << (8 * self.word.itemsize - 1)
            word = word ^ sign if word & sign else ~word & (2 * sign - 1)
        return float(np.array(word, self.word).view(np.float64 if self.wide else np.float32))

    @property
    def top(self) -> int:
        """The integer of infinity."""
        return int(self.words(np.array([math.inf]))[0])


MAGNITUDE = Quantity()


@dataclass(frozen=True)
class Survey:
    """Asks for the size of some groups (without tensors that did not move, unless `count_frozen`) and a sample of each."""

    keys: tuple[Key, ...]
    count_frozen: bool
    quantity: Quantity = MAGNITUDE


@dataclass(frozen=True)
class Surveyed:
    """Number of elements that count, bits of a sample of them, and the tensors that did not move."""

    total: int
    sample: np.ndarray
    still: frozenset[str] = frozenset()

    def __add__(self, other: "Surveyed") -> "Surveyed":
        sample = np.concatenate([self.sample, other.sample])
        return Surveyed(self.total + other.total, sample, self.still | other.still)


@dataclass(frozen=True)
class Count:
    """Asks how the magnitudes (or what else is ranked) of each group fall into windows; tensors in `still` are left out."""

    windows: Mapping[Key, tuple[Window, ...]]
    still: Mapping[Key, frozenset[str]] = field(default_factory=dict)
    quantity: Quantity = MAGNITUDE


@dataclass
class Counted:
    """Per window: how many lie below it, and how many in each bin."""

    below: list[int]
    bins: list[np.ndarray]

    @classmethod
    def none(cls, windows: Sequence[Window]) -> "Counted":
        """Nothing counted yet."""
        return cls([0] * len(windows), [np.zeros(w.bins, np.int64) for w in windows])

    def __add__(self, other: "Counted") -> "Counted":
        return Counted(
            [a + b for a, b in zip(self.below, other.below)], [a + b for a, b in zip(self.bins, other.bins)]
        )


@dataclass(frozen=True)
class Products:
    """Asks for the inner products of all pairs of inputs, tensor by tensor."""


@dataclass(frozen=True)
class Grams:
    """Inner products of all pairs of inputs, float64 [inputs, inputs], by the name of the tensor."""

    by_tensor: Mapping[str, np.ndarray]

    def __add__(self, other: "Grams") -> "Grams":
        return Grams({**self.by_tensor, **other.by_tensor})


@dataclass(frozen=True)
class Sums:
    """Asks for the sums of these quantities over every tensor, for every expert."""

    quantities: tuple[Quantity, ...]


@dataclass(frozen=True)
class Summed:
    """Partial sums in float64 by (name of the quantity, tensor, number of the expert), to be added up exactly."""

    parts: Mapping[tuple[str, str, int], list[float]]

    def __add__(self, other: "Summed") -> "Summed":
        keys = {**self.parts, **other.parts}
        return Summed({key: [*self.parts.get(key, []), *other.parts.get(key, [])] for key in keys})

    def total(self, quantity: str, tensor: str, order: int) -> float:
        """One sum, rounded once."""
        return math.fsum(self.parts[quantity, tensor, order])


Question = Survey | Count | Products | Sums
Answer = dict[Key, Surveyed] | dict[Key, Counted] | Grams | Summed
Ask = Callable[[Question], Answer]


def together(answers: Sequence[Answer]) -> Answer:
    """The answer for all tensors, from the answers for parts of them."""
    whole: Any
    whole, *others = answers
    for other in others:
        if isinstance(whole, dict):
            whole = {key: found + other[key] for key, found in whole.items()}  # type: ignore[index]
        else:
            whole = whole + other
    return whole


@dataclass
class _Quest:
    """The search for one rank of one group."""

    rank: int
    window: Window
    most: int
    value: int | None = None

    def learn(self, below: int, bins: np.ndarray, top: int) -> None:
        """Narrow the window by what was counted in it, or look where the rank must be instead."""
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
) -> dict[Key, Limits]:
    """The numbers at these ranks of every group for every expert; `ask` answers a question about all of them at once."""
    top, most = quantity.top, _fineness(quantity, len(ranks))
    quests: dict[Key, list[_Quest | None]] = {}
    still: dict[Key, frozenset[str]] = {}
    keys = tuple(ranks)
    for first in range(0, len(keys), SURVEYS):
        surveys: Any = ask(Survey(keys[first : first + SURVEYS], count_frozen, quantity))
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

    return {key: Limits(number(low, 0.0), number(high, math.inf)) for key, (low, high) in quests.items()}


def _next_round(quests: Mapping[Key, list[_Quest | None]]) -> dict[Key, list[_Quest]]:
    """The quests to settle in one pass: as many as `COUNTS` allows, so that memory does not grow with the experts."""
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
    """Bins per window. Coarse ones take more passes each, but let every group of a joint quantity share in each pass."""
    if not quantity.joint:
        return BINS
    return 1 << max(min(BINS, COUNTS // (2 * max(groups, 1))), 256).bit_length() - 1


def _quest(rank: int | None, survey: Surveyed, top: int, most: int) -> _Quest | None:
    """Where to look first: the sample's own quantile, give or take 6 standard errors."""
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


def _exact(number: float) -> Fraction:
    """The decimal a person wrote: 0.9 is nine tenths, not the nearest binary fraction."""
    return Fraction(repr(float(number)))


def _portion(fraction: Fraction, n: int) -> int:
    return int(fraction * n)
