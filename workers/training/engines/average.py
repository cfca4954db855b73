"""The exponential moving average of weights over the steps of one task (Polyak averaging; timm's `ModelEma`).

Invariant: it starts from the weights that training starts from, takes in a step that was not skipped, and never bears on a step. Running
statistics of batch normalisation that training moves are averaged with the weights that they belong to.
"""

from collections.abc import Mapping

import torch
from torch.nn.modules.batchnorm import _BatchNorm


class Average:
    """`tensors` are the averages by name, on the model's device: decay * average + (1 - decay) * weights after every step."""

    def __init__(
        self, model: torch.nn.Module, trained: Mapping[str, torch.nn.Parameter], decay: float
    ) -> None:
        moved = {
            f"{name}.{which}": buffer
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.training
            for which, buffer in module.named_buffers()
            if buffer.is_floating_point()
        }
        self._now: dict[str, torch.Tensor] = {**trained, **moved}
        self._weight = 1 - decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in self._now.items()}

    @torch.no_grad()
    def update(self, skipped: torch.Tensor | None) -> None:
        """Take in the weights as they are; nothing where `skipped` is 1.0, which is looked at on the device."""
        averages, now = list(self.tensors.values()), list(self._now.values())
        if skipped is None:
            torch._foreach_lerp_(averages, now, self._weight)
            return
        weight = self._weight * (1 - skipped)
        for average, tensor in zip(averages, now, strict=True):
            average.lerp_(tensor, weight)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from the averages that are `average.NAME` in a checkpoint."""
        for name, average in self.tensors.items():
            average.copy_(tensors[f"average.{name}"])
