"""The protocol by which a merge reads the meaning of tensor names.

`ByName` implements it by a few rules over names and shapes. A model family whose names these rules misread can have its own
implementation; the engine depends on this protocol only.

Invariant: every result is a function of names and shapes, and of a configuration beside the weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from merge_service.anatomy.linear import Linear
from merge_service.anatomy.packed import Packing


class Anatomy(Protocol):
    """What the tensor names of one model mean. Ties are not part of it: they are found by content (`checkpoints.ties`).

    `block` maps each tensor in a block to its stack and its block number; tensors outside blocks have no entry. `stacks` gives
    the depth of every stack by tower, `sequences` the length of numbered lists that are not stacks of blocks; both are for
    reports.
    """

    @property
    def stacks(self) -> Mapping[str, Mapping[str, int]]: ...
    @property
    def block(self) -> Mapping[str, tuple[str, int]]: ...
    @property
    def sequences(self) -> Mapping[str, int]: ...

    def group(self, name: str, granularity: str) -> str:
        """The set of tensors that share thresholds and a majority sign with `name`: by model, tower, tensor or row."""

    def layer(self, name: str) -> int | None:
        """The number of the block that a tensor is in, None outside blocks."""

    def require_blocks(self, what: str, instead: str) -> None:
        """Raise `TechniqueError` if no tensor is in a block, or if a list is unclear. `what` needs blocks; `instead` says what to
        do.
        """

    def packing(self, beside: Path | None, *, split: bool) -> Packing:
        """The matrices in every tensor of the weights at `beside` (None: in memory); with `split`, packed ones are taken apart."""

    def linear(self, name: str) -> Linear | None:
        """How a parameter acts on its input; None for a shift, a scalar or a table of positions."""

    def is_scale(self, name: str) -> bool:
        """Whether this is the log temperature of a CLIP, which is kept at or below ln(100)."""

    def is_statistic(self, name: str) -> bool:
        """Whether this tensor holds running statistics, which are measured on data and not trained."""
