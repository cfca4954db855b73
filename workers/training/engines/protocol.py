"""What `train_expert` needs of a training engine.

Invariant: all engines compute the same step (same loss, schedule, clipping, loss scaling and clamp of the temperature), so which
of them trains an expert is a matter of memory and speed; and everything a step depends on is in the weights, the optimiser state
and the step number, so that a reloaded engine continues with the same bits.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch


class Report(NamedTuple):
    """What a step says of itself. `numbers` float32 [2], on the device: the loss, a mean over all ranks, and the gradient norm before
    clipping. Reading them waits for the step; whoever must not wait copies them (`workers.training.numbers`)."""

    numbers: torch.Tensor
    lr: float

    @property
    def loss(self) -> float:
        return float(self.numbers[0])

    @property
    def grad_norm(self) -> float:
        return float(self.numbers[1])


class Engine(Protocol):
    """What `train_expert` needs of a training engine. Every method is collective: all ranks call it together."""

    def step(self, images: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor | None = None) -> Report:
        """One optimiser step on this rank's share [b, 3, H, W] of the batch; texts are as in `feed.Batch`, or [b, context] without
        `places`. On a GPU it returns before the step is done, but for the parts of DeepSpeed that wait themselves (ZeRO 1 to 3).

        Loss and norm may be non-finite: that is for the caller to judge (with fp16 an infinite norm only means that the step
        was skipped).
        """

    def weights(self) -> dict[str, torch.Tensor]:
        """Every key of `model.state_dict()` on the CPU, floats in fp32; gathered on all ranks."""

    def save(self, directory: Path) -> Callable[[], None]:
        """Take hold of the state as it is now; what is returned writes the rest of what `load` needs into an existing directory, in any
        thread, while training goes on. To be called before the next `save`."""

    def load(self, directory: Path) -> None:
        """Go on from what `save` wrote, bit for bit."""

    def close(self) -> None:
        """Give back memory and hooks; the process group stays."""
