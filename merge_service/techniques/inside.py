"""Experts inside one model: those of a layer that a router chooses from, merged into fewer (M-SMoE).

No checkpoint is read here, because no family of towers names such experts alike. A caller passes the arrays of its layers and writes
the result back. This is no technique: it merges parts of one model, not models.

Invariant: an expert that is the only one of its group comes out unchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge_service.errors import TechniqueError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer with E experts of H neurons: the router's logits on some tokens [tokens, E], weights into the neurons [E, H, d] and
    out of them [E, d, H].
    """

    router_logits: "np.ndarray"
    w_in: "np.ndarray"
    w_out: "np.ndarray"


@dataclass(frozen=True, eq=False)
class Grouped:
    """A layer with fewer experts, float64: weights [K, H, d] and [K, d, H], the core of each group [K], the group of each former expert
    [E], to which the router's choice of it must lead, and the share of tokens that chose it [E].
    """

    w_in: "np.ndarray"
    w_out: "np.ndarray"
    cores: "np.ndarray"
    groups: "np.ndarray"
    usage: "np.ndarray"


def m_smoe(layers: Sequence[Layer], groups: int) -> list[Grouped]:
    """Merge, Then Compress (arXiv 2310.01334): experts of all layers together come down to `groups`.

    The most used experts over all layers are cores, at least one in every layer. Every other expert joins the core of its layer whose
    router logits are most like its own (cosine). Its neurons are permuted to fit the core's, by linear assignment on W_in W_in'^T +
    W_out^T W_out'. A group is the mean of its members, weighted with usage. Equal uses and similarities go to the first.

    Raises TechniqueError for arrays that do not fit each other or are not finite, and for a number of groups that cannot be.
    """
    import numpy as np

    for number, layer in enumerate(layers, 1):
        _check(number, layer)
    experts = sum(len(layer.w_in) for layer in layers)
    if not len(layers) <= groups <= experts:
        raise TechniqueError(
            f"{groups} groups for {experts} experts in {len(layers)} layers; give one for each layer at least, and no more than experts"
        )
    usages = [
        np.bincount(np.asarray(layer.router_logits).argmax(1), minlength=len(layer.w_in))
        / len(layer.router_logits)
        for layer in layers
    ]
    chosen = [[int(usage.argmax())] for usage in usages]
    rest = [
        (-float(use), number, expert)
        for number, usage in enumerate(usages)
        for expert, use in enumerate(usage)
        if expert not in chosen[number]
    ]
    for _, number, expert in sorted(rest)[: groups - len(layers)]:
        chosen[number].append(expert)
    return [_grouped(layer, usage, cores) for layer, usage, cores in zip(layers, usages, chosen)]


def _check(number: int, layer: Layer) -> None:
    import numpy as np

    arrays = [np.asarray(one) for one in (layer.router_logits, layer.w_in, layer.w_out)]
    logits, w_in, w_out = arrays
    fits = (
        (logits.ndim, w_in.ndim, w_out.ndim) == (2, 3, 3)
        and w_out.shape == (w_in.shape[0], w_in.shape[2], w_in.shape[1])
        and logits.shape[1] == len(w_in)
        and logits.size
        and w_in.size
    )
    if not fits:
        raise TechniqueError(
            f"layer {number}: router_logits {list(logits.shape)}, w_in {list(w_in.shape)} and w_out {list(w_out.shape)} must be "
            "[tokens, E], [E, H, d] and [E, d, H]"
        )
    if not all(np.isfinite(one).all() for one in arrays):
        raise TechniqueError(f"layer {number} holds NaN or infinity; check the weights and the tokens")


def _grouped(layer: Layer, usage: "np.ndarray", cores: Sequence[int]) -> Grouped:
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    logits, w_in, w_out = (
        np.asarray(one, np.float64) for one in (layer.router_logits, layer.w_in, layer.w_out)
    )
    lengths = np.linalg.norm(logits, axis=0)
    alike = logits.T @ logits / np.outer(lengths, lengths).clip(np.finfo(float).tiny)
    group = alike[:, cores].argmax(1)
    group[cores] = np.arange(len(cores))
    ins, outs = np.zeros_like(w_in[cores]), np.zeros_like(w_out[cores])
    for number, core in enumerate(cores):
        members = np.flatnonzero(group == number)
        total = usage[members].sum()
        for member in members:
            fit = w_in[core] @ w_in[member].T + w_out[core].T @ w_out[member]
            order = linear_sum_assignment(-fit)[1] if member != core else np.arange(len(fit))
            share = usage[member] / total if total else float(member == core)
            ins[number] += share * w_in[member][order]
            outs[number] += share * w_out[member][:, order]
    return Grouped(ins, outs, np.asarray(cores), group, usage)
