"""Gram matrices of inputs, E x x^T, of every linear map in a model; and what stands for them where an input is sparse.

The token table has the share of each token, the weight of a norm the mean of its squared normalised input. A tensor that acts in
several ways (a token table that is the output layer too) has no one Gram matrix, and none is kept.

Invariant: a Gram matrix is a mean over rows; sums of chunks are in float32, their sum in float64.
"""

from typing import Any

import torch

from workers.evidence.asked import Asked, Inputs
from workers.evidence.network import Opened
from workers.evidence.passes import CHUNK, encode_images, encode_texts, tapped

Sums = dict[str, torch.Tensor]


class Grams:
    """Sums over rows by name, and the number of rows."""

    def __init__(self) -> None:
        self.sums: Sums = {}
        self.rows: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self.ways: dict[str, set[str]] = {}

    def take(self, name: str, how: str, x: torch.Tensor, out: torch.Tensor, chosen: Any) -> None:
        """A `passes.Rows`."""
        ways = self.ways.setdefault(name, set())
        ways.add(how)
        if len(ways) > 1:
            return
        x = x if chosen is None else x[chosen]
        if how == "table":
            found = torch.bincount(x.reshape(-1), minlength=self.sizes[name]).double()
            rows = x.numel()
        else:
            flat = x.reshape(-1, x.shape[-1]).float()
            found, rows = (flat.T @ flat if how == "linear" else (flat * flat).sum(0)).double(), len(flat)
        self.sums[name] = self.sums[name] + found if name in self.sums else found
        self.rows[name] = self.rows.get(name, 0) + rows

    def means(self) -> dict[str, torch.Tensor]:
        """Float64 on the CPU."""
        return {
            name: (total / self.rows[name]).cpu()
            for name, total in self.sums.items()
            if len(self.ways[name]) == 1
        }


def gram(model: Opened, asked: Asked, inputs: Inputs) -> Grams:
    """The Gram matrices over images and texts, as far as there are some of each."""
    found = Grams()
    found.sizes = {name: len(one) for name, one in model.model.named_parameters() if one.ndim}
    with torch.no_grad(), tapped(model, found.take) as counting:
        if inputs.images is not None:
            images = model.images(inputs)
            for start in range(0, len(images), CHUNK):
                encode_images(model, images[start : start + CHUNK])
        if inputs.tokens is not None:
            tokens = model.tokens(inputs)
            for start in range(0, len(tokens), CHUNK):
                encode_texts(model, tokens[start : start + CHUNK], counting)
    return found
