"""Batch normalisation over a batch that is distributed over ranks.

Per-rank statistics would make an expert depend on the number of ranks.
Invariant: with equally many samples on every rank, outputs, gradients and running statistics equal those of one rank with the
whole batch, up to rounding; all ranks get the same running statistics.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.nn.functional import all_reduce
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode


def normalises_over_batch(model: torch.nn.Module) -> bool:
    """Whether any module of a model normalises over the batch."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


class OverRanks(TorchFunctionMode):
    """A context in which batch normalisation during training takes its statistics over all ranks. Collective.

    torch's `SyncBatchNorm` needs a GPU and replaces only torch's own modules. This context replaces the function that all such
    modules call (torch's, timm's, open_clip's), on any device.
    """

    def __init__(self, world: int) -> None:
        super().__init__()
        self._world = world

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is batch_norm:
            return self._function(*args, **(kwargs or {}))
        if func is torch.batch_norm:
            images, weight, bias, mean, variance, training, momentum, eps, *_ = args
            return self._function(images, mean, variance, weight, bias, training, momentum, eps)
        return func(*args, **(kwargs or {}))

    def _function(
        self,
        input: torch.Tensor,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> torch.Tensor:
        """`torch.nn.functional.batch_norm` of [N, C, ...], with N summed over ranks."""
        if not training:
            return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        pixels, shape = input.float(), (1, -1, *[1] * (input.dim() - 2))
        over = [dim for dim in range(input.dim()) if dim != 1]
        count = self._world * input.numel() // input.shape[1]
        mean = all_reduce(pixels.sum(over)) / count
        centred = pixels - mean.view(shape)
        variance = all_reduce(centred.square().sum(over)) / count
        with torch.no_grad():
            if running_mean is not None:
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            if running_var is not None:
                unbiased = variance * (count / max(1, count - 1))
                running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        answer = centred * torch.rsqrt(variance + eps).view(shape)
        if weight is not None:
            answer = answer * weight.float().view(shape)
        if bias is not None:
            answer = answer + bias.float().view(shape)
        return answer.to(input.dtype)
