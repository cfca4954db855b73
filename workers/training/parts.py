"""The gradient of a loss over a whole batch whose activations do not fit into memory: the towers see it in parts.

Every part goes through the towers twice (GradCache, Gao et al. 2021, arXiv 2101.06983; open_clip's `accum_freq`): first without gradient,
for the features that the loss needs of all pairs, then with gradient, against the gradient of the loss with respect to its own features.
Invariant: gradients and loss are those of the whole batch at once, up to rounding; the temperature counts once. Dropout draws for each
part by itself, the same both times.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from workers.training.objective import ContrastiveLoss, Features


class Towers(Protocol):
    """`objective.TwoTowers`, or an engine around it."""

    def __call__(self, images: torch.Tensor, tokens: torch.Tensor) -> Features: ...


def in_parts(
    towers: Towers,
    loss: ContrastiveLoss,
    parts: list[tuple[torch.Tensor, torch.Tensor]],
    places: torch.Tensor | None,
    seed: Callable[[int], None],
    backward: Callable[[int, torch.Tensor], None],
) -> torch.Tensor:
    """This rank's share of the loss, after `backward` was called with the number of each part and a scalar that has its gradient.

    `parts` and `places` are those of `TwoTowers.parts`; `seed` seeds torch for a part.
    """
    with torch.no_grad():
        kept = []
        for number, part in enumerate(parts):
            seed(number)
            kept.append(towers(*part))
    scale, bias = kept[0].scale, kept[0].bias
    whole = Features(
        torch.cat([one.image for one in kept]), torch.cat([one.text for one in kept]), scale, bias
    )
    leaves = Features(*(None if one is None else one.detach().requires_grad_() for one in whole))  # type: ignore[arg-type]
    text = leaves.text if places is None else leaves.text.index_select(0, places)
    found = loss(leaves._replace(text=text))
    found.backward()
    start = [0, 0]
    for number, part in enumerate(parts):
        seed(number)
        one = towers(*part)
        backward(number, _surrogate(one, leaves, start, first=number == 0))
        start = [start[0] + len(one.image), start[1] + len(one.text)]
    return found.detach()


def _surrogate(one: Features, leaves: Features, start: list[int], first: bool) -> torch.Tensor:
    """A scalar whose gradient is the part's share of the gradient of the loss; that of temperature and bias is the first part's."""
    pairs = [(one.image, leaves.image, start[0]), (one.text, leaves.text, start[1])]
    terms = [(x * leaf.grad[at : at + len(x)]).sum() for x, leaf, at in pairs if leaf.grad is not None]
    for x, leaf in ((one.scale, leaves.scale), (one.bias, leaves.bias)):
        if x is not None and leaf is not None and leaf.grad is not None:
            terms.append((x * leaf.grad * float(first)).sum())
    return torch.stack(terms).sum()
