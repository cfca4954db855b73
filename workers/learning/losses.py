"""The losses that learned merges minimise, of log probabilities [N, C] of one task's images.

Invariant: pure functions, no floor inside a logarithm, means over images.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F


def entropy(log_p: torch.Tensor) -> torch.Tensor:
    """The mean entropy of the predictions (AdaMerging, arXiv 2310.02575, eq. 6), without labels."""
    return -(log_p.exp() * log_p).sum(1).mean()


def cross_entropy(log_p: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean of -log p at the labels [N]."""
    return F.nll_loss(log_p, labels)


def divergence(log_p: torch.Tensor, expert: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 times the mean of KL(expert || merged), both at temperature T (DAM, arXiv 2410.08371)."""
    merged, own = F.log_softmax(log_p / temperature, 1), F.log_softmax(expert / temperature, 1)
    return (own.exp() * (own - merged)).sum(1).mean() * temperature**2


def similarity(coefficients: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum over tensors of more than one column of the mean cosine between the coefficients [N, columns] of two experts."""
    total = torch.zeros((), dtype=torch.float64)
    for one in coefficients:
        count = len(one)
        if one.shape[1] < 2 or count < 2:
            continue
        unit = F.normalize(one.double(), dim=1)
        cosines = unit @ unit.T
        total = total + (cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))
    return total


def sure(merged: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """Which samples tinting uses, bool [N]: predictions agree, or the expert is at least as confident (arXiv 2412.19098)."""
    p, own = merged.softmax(1), expert.softmax(1)
    return (p.argmax(1) == own.argmax(1)) | (own.amax(1) >= p.amax(1))


def tinted(merged: torch.Tensor, expert: torch.Tensor) -> torch.Tensor | None:
    """Cross-entropy to the expert's predictions over the samples that are used; None where none is."""
    used = sure(merged.detach(), expert)
    if not bool(used.any()):
        return None
    return F.cross_entropy(merged[used], expert[used].argmax(1))
