"""What `train_expert` needs of a training engine.

Invariant: all engines compute the same step (same loss, schedule, clipping, loss scaling and clamp of the temperature), so which
of them trains an expert is a matter of memory and speed; and everything a step depends on is in the weights, the optimiser state
and the step number, so that a reloaded engine continues with the same bits.
"""

from pathlib import Path
from typing import Protocol

import torch


class Engine(Protocol):
    """What `train_expert` needs of a training engine. Every method is collective: all ranks call it together."""

    def step(self, images: torch.Tensor, tokens: torch.Tensor) -> dict[str, float]:
        """One optimiser step on this rank's share [b, 3, H, W], [b, context] of the batch.

        Returns {"loss": mean over all ranks, "grad_norm": before clipping, "lr"}. `loss` and `grad_norm` may be
        non-finite: that is for the caller to judge (with fp16 an infinite norm only means that the step was skipped).
        """

    def weights(self) -> dict[str, torch.Tensor]:
        """Every key of `model.state_dict()` on the CPU, floats in fp32; gathered on all ranks."""

    def save(self, directory: Path) -> None:
        """Write what `load` needs into an existing directory."""

    def load(self, directory: Path) -> None:
        """Go on from what `save` wrote, bit for bit."""

    def close(self) -> None:
        """Give back memory and hooks; the process group stays."""
