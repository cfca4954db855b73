"""Adam as published (.9, .999, 1e-8), with its state as plain tensors.

Invariant: the state and the number of steps are all that the next step depends on, so learning goes on to the bit after an interruption.
"""

from collections.abc import Mapping

import torch

FIRST, SECOND, EPSILON = 0.9, 0.999, 1e-8
Tensors = dict[str, torch.Tensor]


class Adam:
    """Moves tensors in place against their gradients. `first` and `second` are the moments, `counts` the steps of each tensor."""

    def __init__(self, values: Mapping[str, torch.Tensor], rate: float) -> None:
        self.rate = rate
        self.first: Tensors = {name: torch.zeros_like(one) for name, one in values.items()}
        self.second: Tensors = {name: torch.zeros_like(one) for name, one in values.items()}
        self.counts = dict.fromkeys(values, 0)

    @torch.no_grad()
    def step(self, values: Tensors, gradients: Mapping[str, torch.Tensor]) -> None:
        """One step of every tensor that has a gradient."""
        for name, gradient in gradients.items():
            first, second = self.first[name], self.second[name]
            self.counts[name] += 1
            first.mul_(FIRST).add_(gradient, alpha=1 - FIRST)
            second.mul_(SECOND).addcmul_(gradient, gradient, value=1 - SECOND)
            above = first / (1 - FIRST ** self.counts[name])
            below = (second / (1 - SECOND ** self.counts[name])).sqrt_().add_(EPSILON)
            values[name].sub_(above.div_(below), alpha=self.rate)
