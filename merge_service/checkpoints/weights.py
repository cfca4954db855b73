"""The protocol of a model's weights: named tensors, read span by span, from any source.

A checkpoint on disk is one implementation (`Checkpoint`). A model in memory, an adapter on a base, or a view that permutes
another model's neurons are others; engine and admission depend on this protocol only.

Invariant: reading changes nothing, and the same span gives the same numbers every time.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from merge_service.checkpoints.header import TensorInfo
from merge_service.errors import CheckpointError


class Weights(Protocol):
    """The weights of one model.

    `path` names the weights in messages, and files beside them are looked for there. `files` hold them; none for weights in
    memory. `metadata` is as in a safetensors file. `tensors` has the names used here, in order; two entries of equal `shard` and
    `offset` are one tensor. Admission adapts names that differ only in form: it renames tensors, adds names (`lend`), and removes
    names from `tensors`.
    """

    path: Path
    files: list[Path]
    metadata: Mapping[str, str]
    tensors: dict[str, TensorInfo]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements start..stop of the flattened tensor: float32 (float64 for F64) or the integers as they are."""

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The same elements as stored (bfloat16 as uint16); not writable."""

    def address(self, name: str) -> int | None:
        """The memory address of a tensor's elements as stored, contiguous and aligned to their size; None if they are not.

        Tensors with an address are merged by compiled loops, others block by block through `read`; the bits are the same.
        """

    def rename(self, old: str, new: str) -> int:
        """Replace the prefix `old` of names by `new`; returns the number of changed names. Raises `CheckpointError` if two names
        collide.
        """

    def renamed(self, name: str) -> str:
        """The present form of a name from the metadata."""

    def lend(self, name: str, info: TensorInfo) -> None:
        """Make a tensor readable under this name too."""

    def fingerprint(self) -> str:
        """A digest that is quick to compute and distinguishes weights that training or merging made."""

    def digests(self) -> tuple[str, str]:
        """A digest of the tensors' content, independent of names, order and files, and a sha256 that identifies these very
        weights.
        """


class Named:
    """The part of `Weights` that handles names, for every implementation. `renames` are (old, new) prefixes, `lent` further
    names.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> None:
        self.path = path
        self.tensors = dict(tensors)
        self.metadata = metadata
        self.renames: list[tuple[str, str]] = []
        self.lent: dict[str, TensorInfo] = {}

    def rename(self, old: str, new: str) -> int:
        """As of `Weights`."""
        moved = {name: new + name[len(old) :] if name.startswith(old) else name for name in self.tensors}
        if len(set(moved.values())) != len(moved):
            twice = next(name for name, count in Counter(moved.values()).items() if count > 1)
            raise CheckpointError(f"{self.path} holds {twice!r} with the prefix {old!r} and without it")
        self.tensors = {moved[name]: info for name, info in self.tensors.items()}
        self.renames.append((old, new))
        return sum(name != kept for name, kept in moved.items())

    def renamed(self, name: str) -> str:
        """As of `Weights`."""
        for old, new in self.renames:
            name = new + name[len(old) :] if name.startswith(old) else name
        return name

    def lend(self, name: str, info: TensorInfo) -> None:
        """As of `Weights`."""
        self.tensors[name] = self.lent[name] = info
