"""Inputs and outputs of every parameter in a forward pass, whatever module uses it.

Hooks on modules do not see attention of CLIP: `nn.MultiheadAttention` calls one function for all of it, so that the input of
`out_proj` is nobody's. Its forward is therefore computed here step by step, and a function mode sees each use of a parameter.

Invariant: a model gives the same output with taps as without, up to rounding.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

Take = Callable[[str, str, torch.Tensor, torch.Tensor], None]
"""Takes a parameter's name, how it acts (linear, scale, table), its input [..., d] (tokens [...] for a table), and the output."""
_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
_CONVOLUTIONS = (F.conv2d, torch.conv2d)


class Taps(TorchFunctionMode):
    """Calls `take` at every use of a parameter of a model as a map of its input."""

    def __init__(self, model: torch.nn.Module, take: Take) -> None:
        super().__init__()
        self.take = take
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is F.linear or func in _PRODUCTS:
            self._say("linear", args[1] if len(args) > 1 else kwargs.get("weight"), args[0], out)
        elif func is F.layer_norm:
            weight = args[2] if len(args) > 2 else kwargs.get("weight")
            if id(weight) in self.names:
                eps = args[4] if len(args) > 4 else kwargs.get("eps", 1e-5)
                self._say("scale", weight, F.layer_norm(args[0], args[1], None, None, eps), out)
        elif func is F.embedding:
            self._say("table", args[1], args[0], out)
        elif func in _CONVOLUTIONS:
            self._convolution(args, kwargs, out)
        return out

    def _say(self, how: str, weight: Any, x: torch.Tensor, out: torch.Tensor) -> None:
        name = self.names.get(id(weight))
        if name is not None:
            self.take(name, how, x, out)

    def _convolution(self, args: Any, kwargs: Any, out: torch.Tensor) -> None:
        """A convolution whose patches do not overlap is a map of the unfolded patch, channels first."""
        x, weight = args[0], args[1]
        stride = args[3] if len(args) > 3 else kwargs.get("stride", 1)
        groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
        stride = stride if isinstance(stride, tuple | list) else (stride, stride)
        if id(weight) in self.names and tuple(stride) == tuple(weight.shape[2:]) and groups == 1:
            patches = F.unfold(x, weight.shape[2:], stride=tuple(stride)).transpose(1, 2)
            self._say("linear", weight, patches, out)


@contextlib.contextmanager
def opened(model: torch.nn.Module) -> Iterator[None]:
    """Attention computed step by step, for as long as the context lasts."""
    layers = [one for one in model.modules() if isinstance(one, torch.nn.MultiheadAttention)]
    for layer in layers:
        layer.forward = partial(_attention, layer, layer.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _attention(
    layer: torch.nn.MultiheadAttention, plain: Callable[..., Any], query: torch.Tensor, key: torch.Tensor,
    value: torch.Tensor, **options: Any,
) -> Any:  # fmt: skip
    """Self-attention; anything else (other inputs, masks by key, added keys) goes the plain way, unseen."""
    unusual = options.get("key_padding_mask") is not None or layer.bias_k is not None or layer.add_zero_attn
    if query is not key or key is not value or layer.in_proj_weight is None or query.ndim != 3 or unusual:
        return plain(query, key, value, **options)
    x = query if layer.batch_first else query.transpose(0, 1)
    count, length, width = x.shape
    heads = layer.num_heads
    parts = F.linear(x, layer.in_proj_weight, layer.in_proj_bias)
    q, k, v = (one.view(count, length, heads, width // heads).transpose(1, 2) for one in parts.chunk(3, -1))
    mask = options.get("attn_mask")
    if mask is not None and mask.ndim == 3:
        mask = mask.view(count, heads, length, length)
    seen = F.scaled_dot_product_attention(q, k, v, attn_mask=_as_bias(mask, q))
    joined = seen.transpose(1, 2).reshape(count, length, width)
    out = F.linear(joined, layer.out_proj.weight, layer.out_proj.bias)
    return (out if layer.batch_first else out.transpose(0, 1)), None


def _as_bias(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """A mask in PyTorch's convention (true: not to be seen) as what is added to scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask if mask is None else mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
