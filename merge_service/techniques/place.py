"""What a rule may know of the block it is given, what it remembers of experts, and how a block voted.

Invariant: values only; nothing here computes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from merge_service.blocks.questions import EVERYTHING, Limits

Array = Any
"""A numpy array, or a torch tensor on a device."""
State = dict[str, Array]


@dataclass(frozen=True)
class Place:
    """What a rule may know of the block it is given, apart from its numbers.

    `order` counts experts from 1. `share` is the expert's part of the mean so far. `turn` holds the two factors of a slerp,
    None where it falls back to a straight line. `limits`, `key`, `density` and `epsilon` serve sparsifying; `gain` makes up for
    what was dropped (None: by the probability of being kept), or is what an expert weighs in its tensor; `scores` are limits of
    a second quantity. `start` is the index of the block's first element in its tensor, `columns` the length of the rows that
    the block consists of, 0 unless it was cut at rows.
    """

    order: int = 1
    share: float = 1.0
    turn: tuple[float, float] | None = None
    limits: Limits = EVERYTHING
    scores: Limits = EVERYTHING
    key: int | None = None
    density: float = 1.0
    epsilon: float = 0.0
    gain: float | None = None
    start: int = 0
    columns: int = 0


@dataclass(frozen=True)
class Election:
    """How a block voted: elected pluses minus minuses, and whether any element's sum cancelled exactly."""

    balance: int = 0
    contested: bool = False


class View(Protocol):
    """What is asked of a merge while numbers of whole tensors are looked for.

    `orders` are the numbers of its experts, `combined` its tensors with their sizes, `group_sizes` the elements of every group that
    shares thresholds; `wide` says whether some tensor is float64.
    """

    @property
    def orders(self) -> Sequence[int]: ...
    @property
    def combined(self) -> Sequence[tuple[str, int]]: ...
    @property
    def group_sizes(self) -> Mapping[str, int]: ...
    @property
    def wide(self) -> bool: ...
