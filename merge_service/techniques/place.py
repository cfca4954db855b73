"""What a rule may know of a block, the state it keeps of experts, and how a block voted.

Invariant: values only; nothing here computes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from merge_service.anatomy.protocol import Anatomy
from merge_service.blocks.questions import EVERYTHING, Thresholds

Array = Any
"""A numpy array, or a torch tensor on a device."""
State = dict[str, Array]


@dataclass(frozen=True)
class Place:
    """What a rule may know of a block, apart from its numbers.

    `order` counts experts from 1. `share` is the expert's part of the mean so far. `turn` holds the two factors of a slerp, None
    for a straight line. `thresholds`, `key`, `density` and `epsilon` serve to thin out. `gain` compensates for what was dropped
    (None: by the probability of being kept), or is an expert's weight in its tensor. `scores` are thresholds of a second
    quantity. `start` is the index of the block's first element in its tensor, `columns` the length of the rows that the block
    consists of, 0 unless it was cut at rows. `evidence` is what was measured of the expert in this block, for rules that are `measured`.
    `weight` is the factor of the expert's task vector in the tensor, for rules that are weighed.
    """

    order: int = 1
    share: float = 1.0
    turn: tuple[float, float] | None = None
    thresholds: Thresholds = EVERYTHING
    scores: Thresholds = EVERYTHING
    key: int | None = None
    density: float = 1.0
    epsilon: float = 0.0
    gain: float | None = None
    start: int = 0
    columns: int = 0
    evidence: Array | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Election:
    """How a block voted: elected pluses minus minuses, and whether any element's sum cancelled exactly."""

    balance: int = 0
    contested: bool = False


class View(Protocol):
    """A merge as a rule may see it before blocks are computed.

    `orders` are the numbers of its experts, `merged` its tensors with their sizes, `combined` those that the technique itself is
    applied to, `group_sizes` the elements of every group that shares thresholds; `wide` says whether some tensor is float64.
    """

    @property
    def params(self) -> Mapping[str, Any]: ...
    @property
    def orders(self) -> Sequence[int]: ...
    @property
    def merged(self) -> Sequence[tuple[str, int]]: ...
    @property
    def combined(self) -> Sequence[tuple[str, int]]: ...
    @property
    def group_sizes(self) -> Mapping[str, int]: ...
    @property
    def wide(self) -> bool: ...
    @property
    def anatomy(self) -> Anatomy: ...


class Seen(Protocol):
    """The blocks of all experts over the elements that a quantity is measured on, with their places, in order."""

    @property
    def params(self) -> Mapping[str, Any]: ...
    @property
    def orders(self) -> Sequence[int]: ...
    @property
    def blocks(self) -> Sequence[Array]: ...
    @property
    def places(self) -> Sequence[Place]: ...
    @property
    def held(self) -> Mapping[str, Array]:
        """The state of the experts before these, over the same elements; empty where there were none."""

    def once(self, function: Callable[[Any, Sequence[Array], Sequence[Place]], Any]) -> Any:
        """`function(xp, blocks, places)`, computed once for all experts."""
