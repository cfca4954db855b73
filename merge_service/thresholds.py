"""The exact k-th smallest magnitude of a task vector, without sorting it or holding it in memory.

Magnitudes of floats, read as unsigned integers, keep their order. A sample says between which two values the wanted rank
must lie; one pass counts what is below and how often each value between occurs, which settles it. Where the sample was wrong
the search goes on in the part that was missed, so the answer is exact whatever was drawn. Counts add up: blocks, threads and
machines count apart, and what is asked of them (`Survey`, `Count`) and answered are plain values.

Invariant: exact, and independent of blocks, threads, machines and the sample.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

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
    def of(cls, low: int, high: int) -> "Window":
        """As fine as `BINS` allows."""
        return cls(low, high, max(0, (high - low).bit_length() - (BINS.bit_length() - 1)))


@dataclass(frozen=True)
class Survey:
    """Asks for the size of a group (without tensors that did not move, unless `count_frozen`) and a sample."""

    key: Key
    count_frozen: bool


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
    """Asks how the magnitudes of each group fall into windows; tensors in `still` are left out."""

    windows: Mapping[Key, tuple[Window, ...]]
    still: Mapping[Key, frozenset[str]]


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


Question = Survey | Count | Products
Answer = Surveyed | dict[Key, Counted] | Grams
Ask = Callable[[Question], Answer]


def together(answers: Sequence[Answer]) -> Answer:
    """The answer for all tensors, from the answers for parts of them."""
    whole, *others = answers
    for other in others:
        if isinstance(whole, dict):
            assert isinstance(other, dict)
            whole = {key: found + other[key] for key, found in whole.items()}
        else:
            whole = whole + other  # type: ignore[operator]
    return whole


@dataclass
class _Quest:
    """The search for one rank of one group."""

    rank: int
    window: Window
    value: int | None = None
    tried: int = field(default=0)

    def learn(self, below: int, bins: np.ndarray, top: int) -> None:
        """Narrow the window by what was counted in it, or look where the rank must be instead."""
        self.tried += 1
        inside = int(bins.sum())
        if self.rank <= below:
            self.window = Window.of(0, self.window.low - 1)
        elif self.rank > below + inside:
            self.window = Window.of(self.window.high + 1, top)
        else:
            before = np.cumsum(bins)
            chosen = int(np.searchsorted(before, self.rank - below))
            low = self.window.low + (chosen << self.window.shift)
            if self.window.shift == 0:
                self.value = low
            else:
                high = min(low + (1 << self.window.shift) - 1, self.window.high)
                self.window = Window.of(low, high)


def search(
    keys: Sequence[Key], ranks: Ranks, ask: Ask, *, count_frozen: bool, wide: bool
) -> dict[Key, Limits]:
    """The limits of every group for every expert.

    `ask` answers a `Survey` or a `Count` about all of them at once; `wide` says that some magnitudes are float64.
    """
    float_type, word = (np.float64, np.uint64) if wide else (np.float32, np.uint32)
    top = int(np.array(np.inf, float_type).view(word))
    quests: dict[Key, list[_Quest | None]] = {}
    still: dict[Key, frozenset[str]] = {}
    for key in keys:
        survey = ask(Survey(key, count_frozen))
        assert isinstance(survey, Surveyed)
        quests[key], still[key] = [_quest(rank, survey, top) for rank in ranks(survey.total)], survey.still
    while unsettled := _next_round(quests):
        windows = {key: tuple(quest.window for quest in found) for key, found in unsettled.items()}
        counted = ask(Count(windows, {key: still[key] for key in windows}))
        assert isinstance(counted, dict)
        for key, found in unsettled.items():
            for quest, below, bins in zip(found, counted[key].below, counted[key].bins):
                quest.learn(below, bins, top)

    def number(quest: _Quest | None, otherwise: float) -> float:
        if quest is None or quest.value is None:
            return otherwise
        return float(np.array(quest.value, word).view(float_type))

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


def _quest(rank: int | None, survey: Surveyed, top: int) -> _Quest | None:
    """Where to look first: the sample's own quantile, give or take 6 standard errors."""
    if rank is None:
        return None
    size = survey.sample.size
    if size == survey.total:
        value = int(np.partition(survey.sample, rank - 1)[rank - 1])
        return _Quest(rank, Window(value, value, 0), value)
    if size < 256:
        return _Quest(rank, Window.of(0, top))
    share = rank / survey.total
    slack = 6 * math.sqrt(size * share * (1 - share)) + 32
    low, high = int(max(share * size - slack, 0)), int(min(share * size + slack, size - 1))
    parted = np.partition(survey.sample, (low, high))
    first = 0 if low == 0 else int(parted[low])
    last = top if high == size - 1 else int(parted[high])
    return _Quest(rank, Window.of(first, last))


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
