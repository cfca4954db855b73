"""Questions about whole tensors as plain values (thresholds, counts, sums, inner products), and their answers.

Blocks, threads and machines answer for their own part of a model, and answers add up. `search` derives exact ranks from such
answers; `engine.survey` computes answers from files.

Invariant: an answer for a model is the sum of the answers for its parts, however it is cut.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

Ranks = Callable[[int], tuple[int | None, int | None]]
Key = tuple[str, int]
"""A group of tensors and the number of an expert."""


@dataclass(frozen=True)
class Thresholds:
    """Magnitudes from `low` to `high`, both included, are kept."""

    low: float = 0.0
    high: float = float("inf")


EVERYTHING = Thresholds()


@dataclass(frozen=True)
class Findings:
    """Statistics of whole tensors that blocks depend on, by (group of tensors or tensor, number of the expert).

    `thresholds` bound the magnitudes that are kept, `scores` those of a second quantity. `gains` are factors; `turns` are the two
    factors of a merge along an arc.
    """

    thresholds: Mapping[Key, Thresholds] = field(default_factory=dict)
    scores: Mapping[Key, Thresholds] = field(default_factory=dict)
    gains: Mapping[Key, float] = field(default_factory=dict)
    turns: Mapping[Key, tuple[float, float]] = field(default_factory=dict)

    def with_(self, **further: Mapping[Key, Any]) -> "Findings":
        """A copy with further findings, by field."""
        return replace(self, **{name: {**getattr(self, name), **found} for name, found in further.items()})


NOTHING = Findings()


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
    """A quantity that is ranked or summed, and the form of its numbers (`wide`: float64, `signed`: also below zero).

    "magnitude" and "thinned" are those of one expert's task vector, before and after it is thinned out. Other names belong to a
    technique: `measure` computes the quantity of one expert from the blocks of all experts (`techniques.place.Seen`). `measure`
    must be a function of a module, because questions are sent to other processes. The groups of a `joint` quantity are best
    counted in one pass. `given` holds earlier findings that the quantity depends on; quantities of one question share it. `tensors`, also a
    function of a module, takes a whole tensor (`techniques.rule.Tensor`) instead and gives the numbers of every expert in it, of any
    number, or None where the quantity has none.
    """

    name: str = "magnitude"
    wide: bool = False
    signed: bool = False
    joint: bool = False
    given: Findings = NOTHING
    measure: Callable[[Any, int], Any] | None = None
    tensors: "Callable[[Any], Sequence[np.ndarray] | None] | None" = None

    @property
    def word(self) -> "np.dtype":
        """The unsigned integer type that keeps the order of the numbers."""
        import numpy as np

        return np.dtype(np.uint64 if self.wide else np.uint32)

    def words(self, values: "np.ndarray") -> "np.ndarray":
        """Numbers as integers of that type."""
        import numpy as np

        values = np.ascontiguousarray(values, np.float64 if self.wide else np.float32)
        bits = values.view(self.word)
        if not self.signed:
            return bits
        sign = self.word.type(1 << (8 * self.word.itemsize - 1))
        return np.where(bits & sign, ~bits, bits | sign)

    def number(self, word: int) -> float:
        """The number that an integer stands for."""
        import numpy as np

        if self.signed:
            sign = 1 << (8 * self.word.itemsize - 1)
            word = word ^ sign if word & sign else ~word & (2 * sign - 1)
        return float(np.array(word, self.word).view(np.float64 if self.wide else np.float32))

    @property
    def top(self) -> int:
        """The integer that stands for infinity."""
        import numpy as np

        return int(self.words(np.array([math.inf]))[0])


MAGNITUDE = Quantity()


@dataclass(frozen=True)
class Survey:
    """Question: the size of some groups (without tensors that did not move, unless `count_frozen`), and a sample of each."""

    keys: tuple[Key, ...]
    count_frozen: bool
    quantity: Quantity = MAGNITUDE


@dataclass(frozen=True)
class Surveyed:
    """Answer to `Survey`: number of elements that count, bits of a sample of them, and the tensors that did not move."""

    total: int
    sample: "np.ndarray"
    still: frozenset[str] = frozenset()

    def __add__(self, other: "Surveyed") -> "Surveyed":
        import numpy as np

        sample = np.concatenate([self.sample, other.sample])
        return Surveyed(self.total + other.total, sample, self.still | other.still)


@dataclass(frozen=True)
class Count:
    """Question: how the magnitudes (or another quantity) of each group fall into windows. Tensors in `still` are left out."""

    windows: Mapping[Key, tuple[Window, ...]]
    still: Mapping[Key, frozenset[str]] = field(default_factory=dict)
    quantity: Quantity = MAGNITUDE


@dataclass
class Counted:
    """Answer to `Count`, per window: how many values lie below it, and how many in each bin."""

    below: list[int]
    bins: "list[np.ndarray]"

    @classmethod
    def none(cls, windows: Sequence[Window]) -> "Counted":
        """Nothing counted yet."""
        import numpy as np

        return cls([0] * len(windows), [np.zeros(w.bins, np.int64) for w in windows])

    def __add__(self, other: "Counted") -> "Counted":
        return Counted(
            [a + b for a, b in zip(self.below, other.below)], [a + b for a, b in zip(self.bins, other.bins)]
        )


@dataclass(frozen=True)
class Products:
    """Question: the inner products of all pairs of inputs, tensor by tensor."""


@dataclass(frozen=True)
class Grams:
    """Answer to `Products`: inner products of all pairs of inputs, float64 [inputs, inputs], by tensor name."""

    by_tensor: "Mapping[str, np.ndarray]"

    def __add__(self, other: "Grams") -> "Grams":
        return Grams({**self.by_tensor, **other.by_tensor})


@dataclass(frozen=True)
class Sums:
    """Question: the sums of these quantities over every tensor, for every expert."""

    quantities: tuple[Quantity, ...]


@dataclass(frozen=True)
class Summed:
    """Answer to `Sums`: partial sums in float64 by (name of the quantity, tensor, number of the expert), to be added exactly."""

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
