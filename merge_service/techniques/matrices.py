"""The arithmetic of techniques that see a weight as a matrix: Iso-C, Iso-CTS, OPCM, RAPF.

Invariant: no SVD and no full U or V. Singular values and the singular vectors of one side come from eigenvalues of the
smaller Gram matrix, in float64; the other side is only ever met in products with the matrix itself. float32 squared neither
overflows nor underflows in float64, so nothing is scaled beforehand.

Numerical rank: a singular value s of an m x n matrix is zero when s <= s_max * (sqrt(m) + sqrt(n)) * 2^-23. So much can a
relative float32 rounding of every element add to a spectrum (spectral norm of a random matrix), and it is well above the
1e-8 * s_max that a Gram matrix resolves. What lies below is rounding, and stays out.

`xp` is numpy or torch. Matrices are finite; results have the type of the task vectors given. Signs of singular vectors
cancel. Equal singular values leave their vectors undetermined: Iso-C does not mind, OPCM and RAPF do, by definition. The
last bits depend on how many threads BLAS works with: hold it at one, and run several matrices at a time instead.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

Array = Any
ROWS = 4096


def isotropic(total: Array, xp: Any = np) -> Array:
    """Iso-C (arXiv 2502.04959): mean(S) * U V^T of `total` = U S V^T, the (m, n) sum of the task vectors.

    The mean is over the numerical rank: the nuclear norm stays, and every singular value that is not zero is the same.
    (The released code divides by min(m, n) and fills directions that the experts never moved in.) Zeros give zeros.
    """
    if total.shape[0] < total.shape[1]:
        return isotropic(total.T, xp).T
    values, right = _frame(total, xp)
    if not len(values):
        return xp.zeros_like(total)
    half = right * (values.mean() / values) ** 0.5
    flat = half @ half.T
    result = xp.empty_like(total)
    for rows in _blocks(total):
        result[rows] = _wide(total[rows], xp) @ flat
    return result


def isotropic_task_specific(
    total: Array, taus: Iterable[Array], count: int, common_fraction: float = 0.8, xp: Any = np
) -> Array:
    """Iso-CTS (arXiv 2502.04959): leading directions of the sum, and of each task vector outside them, of equal length.

    `taus` yields the `count` task vectors whose sum is `total`, (m, n) all; each is read once and let go. Of the min(m, n)
    directions a task has `task_dimensions`, the sum has the others; where that is 0 (more tasks than directions to share)
    the result is Iso-C and `taus` is left unread. Directions below the numerical rank are left out (a task's are measured
    against the Frobenius norm of its whole task vector), and the mean is over the singular values taken. Directions that
    coincide, as equal experts' do, count once.
    """
    own = task_dimensions(min(total.shape), count, common_fraction)
    if not own:
        return isotropic(total, xp)
    left, values, right, rest = _common(total, min(total.shape) - own * count, xp)
    parts = [(left, values, right)]
    for tau in taus:
        parts.append(_inside(tau, rest, own, xp) if rest is not None else _outside(tau, left, own, xp))
    lefts, spectrum, rights = (xp.concatenate(side, -1) for side in zip(*parts))
    if not len(spectrum):
        return xp.zeros_like(total)
    core = _inverse_root(lefts, xp) @ _inverse_root(rights, xp) * spectrum.mean()
    return xp.asarray(lefts @ core @ rights.T, dtype=total.dtype)


def task_dimensions(size: int, count: int, common_fraction: float) -> int:
    """How many of `size` directions each of `count` tasks has in Iso-CTS: round((size - int(size * fraction)) / count).

    As in the released code, but never more than size // count, where rounding up would leave the sum a negative number.
    """
    return min(round((size - int(size * common_fraction)) / count), size // count)


def opcm_project(previous: Array, tau: Array, alpha: float = 0.5, xp: Any = np) -> Array:
    """OPCM (arXiv 2501.09522): the part of `tau` that keeps clear of what was merged before, `previous` = U S V^T; (m, n).

    In P = U^T tau V the diagonal and the leading r x r block are dropped; r counts the singular values whose cumulated sum
    is at most `alpha` of the total. So the result is orthogonal to `previous` and no longer than `tau`. Only the direction
    of `previous` matters, so the sum of projected task vectors serves as well as the merged one. Directions outside its
    numerical rank pass: zeros give `tau` itself (the released code drops the diagonal of tau then). alpha = 1 drops the
    whole block of the numerical rank (the released code then drops 0 or all but one, by rounding).
    """
    if tau.shape[0] < tau.shape[1]:
        return opcm_project(previous.T, tau.T, alpha, xp).T
    values, right = _frame(previous, xp)
    if not len(values):
        return tau
    unit = right / values
    seen = _cross(previous, tau, xp) @ right
    below = xp.cumsum(xp.flip(values, (0,)), 0)
    block = slice(len(values) - int((below <= alpha * below[-1]).sum()), None)
    back = unit * (unit * seen).sum(0)
    back[:, block] = unit[:, block] @ (unit[:, block].T @ seen[:, block])
    back = back @ right.T
    result = xp.empty_like(tau)
    for rows in _blocks(tau):
        result[rows] = _wide(tau[rows], xp) - _wide(previous[rows], xp) @ back
    return result


def rapf_fuse(old: Array, new: Array, b: float, xp: Any = np) -> Array:
    """RAPF's parameter fusion (arXiv 2407.14143) of two (m, n) weights; the larger `b` >= 0, the more of the new one.

    With `old` = U S V^T and D = |U^T (new - old)| it is U (M * U^T new + (1 - M) * U^T old), M = min(D / max D + b, 1): what
    changed most is taken over, what changed little is held back. Outside the numerical rank of `old` there is nothing to
    hold on to and `new` passes; so it does where D = 0 (0/0 in the released code, which is for square weights).
    """
    if old.shape[0] > old.shape[1]:
        values, right = _frame(old, xp)
        left = _wide(old, xp) @ (right / values)
    else:
        left = _frame(old.T, xp)[1]
    change = left.T @ (_wide(new, xp) - _wide(old, xp))
    size = abs(change)
    largest = float(size.max()) if len(size) else 0.0
    if not largest:
        return new
    held = xp.clip(1 - b - size / largest, 0, None)
    return xp.asarray(_wide(new, xp) - left @ (held * change), dtype=new.dtype)


def _common(total: Array, count: int, xp: Any) -> tuple[Array, Array, Array, Array | None]:
    """At most `count` leading singular triplets, and where it is cheap (m <= n) a basis of what the left vectors leave."""
    if total.shape[0] > total.shape[1]:
        values, right = _frame(total, xp, count)
        return _wide(total, xp) @ (right / values), values, right, None
    tall = total.T
    values, vectors, rank = _spectrum(_cross(tall, tall, xp), tall.shape, xp)
    cut = len(values) - min(count, rank)
    left, values = vectors[:, cut:], values[cut:]
    return left, values, _wide(tall, xp) @ (left / values), vectors[:, :cut]


def _inside(tau: Array, basis: Array, count: int, xp: Any) -> tuple[Array, Array, Array]:
    """The `count` leading singular triplets of tau (m <= n) within the space of the orthonormal columns of `basis`."""
    wide = _wide(tau, xp)
    part = basis.T @ wide
    values, vectors, rank = _spectrum(part @ part.T, tau.shape, xp, float((wide * wide).sum()) ** 0.5)
    cut = len(values) - min(count, rank)
    values, vectors = values[cut:], vectors[:, cut:]
    return basis @ vectors, values, part.T @ (vectors / values)


def _outside(tau: Array, basis: Array, count: int, xp: Any) -> tuple[Array, Array, Array]:
    """The `count` leading singular triplets of tau (m > n) outside the space of the orthonormal columns of `basis`."""
    gram, seen = _cross(tau, tau, xp), _cross(basis, tau, xp)
    scale = float(xp.diag(gram).sum()) ** 0.5
    values, right, rank = _spectrum(gram - seen.T @ seen, tau.shape, xp, scale)
    cut = len(values) - min(count, rank)
    values, right = values[cut:], right[:, cut:]
    unit = right / values
    return _wide(tau, xp) @ unit - basis @ (seen @ unit), values, right


def _inverse_root(columns: Array, xp: Any) -> Array:
    """(C^T C)^(-1/2) on the numerical rank of C: C times it is the polar factor, the nearest orthonormal columns."""
    values, vectors = _frame(columns, xp)
    half = vectors / values**0.5
    return half @ half.T


def _frame(tall: Array, xp: Any, count: int | None = None) -> tuple[Array, Array]:
    """Singular values (ascending) and right singular vectors (columns) of the numerical rank, at most `count`."""
    values, right, rank = _spectrum(_cross(tall, tall, xp), tall.shape, xp)
    cut = len(values) - (rank if count is None else min(count, rank))
    return values[cut:], right[:, cut:]


def _spectrum(
    gram: Array, shape: tuple[int, ...], xp: Any, scale: float | None = None
) -> tuple[Array, Array, int]:
    """Roots of the eigenvalues of a Gram matrix (ascending), eigenvectors, and how many roots are not zero.

    Zero is measured against the largest root, or against `scale` where the matrix is a part of a larger one.
    """
    squares, vectors = xp.linalg.eigh(gram)
    values = xp.clip(squares, 0, None) ** 0.5
    noise = (math.sqrt(shape[0]) + math.sqrt(shape[1])) * 2.0**-23
    return values, vectors, int((values > noise * (values[-1:] if scale is None else scale)).sum())


def _cross(a: Array, b: Array, xp: Any) -> Array:
    """a^T b in float64, a block of rows at a time."""
    total = 0.0
    for rows in _blocks(a):
        first = _wide(a[rows], xp)
        total = total + first.T @ (first if b is a else _wide(b[rows], xp))
    return total


def _wide(matrix: Array, xp: Any) -> Array:
    return xp.asarray(matrix, dtype=xp.float64)


def _blocks(matrix: Array) -> Iterator[slice]:
    return (slice(start, start + ROWS) for start in range(0, matrix.shape[0], ROWS))
