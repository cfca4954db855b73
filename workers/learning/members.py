"""The base and the experts of a learned merge, read through memory maps: task vectors in pieces, on the device that learns.

Invariant: memory holds a few pieces, for any number of experts.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from merge_service.checkpoints import Checkpoint
from merge_service.errors import UserError
from workers.evidence.network import Opened

PIECE = 1 << 20
"""Elements of one piece."""


@dataclass(frozen=True)
class Members:
    """Open checkpoints, and the model whose parameters are filled with their merge."""

    base: Checkpoint
    experts: Sequence[Checkpoint]
    model: Opened

    def parameter(self, name: str) -> torch.nn.Parameter:
        """A parameter of the model."""
        return self.model.model.get_parameter(name)

    def pieces(self, name: str) -> Iterator[slice]:
        """The pieces of a flattened parameter."""
        size = self.base.tensors[name].numel
        return (slice(start, min(start + PIECE, size)) for start in range(0, size, PIECE))

    def of_base(self, name: str, where: slice) -> torch.Tensor:
        """Elements of the base."""
        return self._read(self.base, name, where)

    def of_expert(self, number: int, name: str, where: slice | None = None) -> torch.Tensor:
        """Elements of an expert, all of them in the parameter's shape without `where`."""
        if where is None:
            whole = slice(0, self.base.tensors[name].numel)
            return self._read(self.experts[number], name, whole).view(self.base.tensors[name].shape)
        return self._read(self.experts[number], name, where)

    def vectors(self, name: str, where: slice) -> Iterator[torch.Tensor]:
        """Elements of every expert's task vector, one expert after the other."""
        start = self.of_base(name, where)
        return (self.of_expert(number, name, where) - start for number in range(len(self.experts)))

    def _read(self, weights: Checkpoint, name: str, where: slice) -> torch.Tensor:
        found = np.array(weights.read(name, where.start, where.stop), np.float32)
        return torch.from_numpy(found).to(self.model.device)


@contextlib.contextmanager
def opened(base: Path, experts: Sequence[Path], model: Opened) -> Iterator[Members]:
    """Raises UserError for an expert that lacks a parameter of the model, or has it in another shape."""
    with contextlib.ExitStack() as stack:
        start = stack.enter_context(Checkpoint.open(base))
        held = [stack.enter_context(Checkpoint.open(path)) for path in experts]
        for weights in (start, *held):
            for name, parameter in model.model.named_parameters():
                info = weights.tensors.get(name)
                if info is None or tuple(info.shape) != tuple(parameter.shape):
                    found = "is missing" if info is None else f"has shape {list(info.shape)}"
                    raise UserError(
                        f"{weights.path}: {name} {found}; the model has it as {list(parameter.shape)}"
                    )
        yield Members(start, held, model)
