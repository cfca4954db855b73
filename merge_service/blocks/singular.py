"""Singular values and vectors of a matrix, from eigenvalues of the smaller Gram matrix in float64.

Invariant: no SVD and no full U or V. The vectors of one side come from the Gram matrix; the other side is used only in products
with the matrix itself. float32 squared neither overflows nor underflows in float64, so nothing is scaled beforehand.

Numerical rank: a singular value s of an m x n matrix is zero when s <= s_max * (sqrt(m) + sqrt(n)) * 2^-23. A relative float32
rounding of every element can add that much to a spectrum (spectral norm of a random matrix), and it is well above the 1e-8 *
s_max that a Gram matrix resolves. Smaller values are rounding and are left out.

`xp` is numpy or torch. Matrices are finite. Signs of singular vectors are arbitrary, and equal singular values leave their
vectors undetermined. The last bits depend on the number of BLAS threads: limit BLAS to one thread, and run several matrices at a
time.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

Array = Any
ROWS = 4096


def frame(tall: Array, xp: Any, count: int | None = None) -> tuple[Array, Array]:
    """Singular values (ascending) and right singular vectors (columns) of the numerical rank, at most `count`."""
    values, right, rank = spectrum(cross(tall, tall, xp), tall.shape, xp)
    cut = len(values) - (rank if count is None else min(count, rank))
    return values[cut:], right[:, cut:]


def left_vectors(matrix: Array, xp: Any) -> Array:
    """The left singular vectors (columns) of the numerical rank."""
    if matrix.shape[0] <= matrix.shape[1]:
        return frame(matrix.T, xp)[1]
    values, right = frame(matrix, xp)
    return wide(matrix, xp) @ (right / values)


def spectrum(
    gram: Array, shape: tuple[int, ...], xp: Any, scale: float | None = None
) -> tuple[Array, Array, int]:
    """Roots of the eigenvalues of a Gram matrix (ascending), eigenvectors, and how many roots are not zero.

    Zero is measured against the largest root, or against `scale` where the matrix is a part of a larger one.
    """
    squares, vectors = xp.linalg.eigh(gram)
    values = xp.clip(squares, 0, None) ** 0.5
    return values, vectors, int((values > noise(shape) * (values[-1:] if scale is None else scale)).sum())


def noise(shape: tuple[int, ...]) -> float:
    """The largest singular value that counts as zero in a matrix of this shape, as a fraction of its largest one."""
    return (math.sqrt(shape[0]) + math.sqrt(shape[1])) * 2.0**-23


def cross(a: Array, b: Array, xp: Any) -> Array:
    """a^T b in float64, computed by blocks of rows."""
    total = 0.0
    for rows in rows_of(a):
        first = wide(a[rows], xp)
        total = total + first.T @ (first if b is a else wide(b[rows], xp))
    return total


def shared_frame(matrices: Sequence[Array], cutoff: float, xp: Any) -> tuple[Array, list[Array]]:
    """U (m, k) and every S V_i^T (k, n) of the (m, n) matrices side by side, [A_1 .. A_N] = U S [V_1 .. V_N]^T, float64, in ascending order.

    Singular values up to `cutoff` are left out, and those that a Gram matrix does not resolve (1e-8 of the largest).
    """
    full = [wide(one, xp) for one in matrices]
    rows, columns = full[0].shape
    if rows <= columns * len(full):
        squares, vectors = xp.linalg.eigh(sum(one @ one.T for one in full))
        basis = vectors[:, _seen(squares, cutoff)]
        return basis, [basis.T @ one for one in full]
    together = xp.concatenate(full, 1)
    squares, vectors = xp.linalg.eigh(together.T @ together)
    seen = _seen(squares, cutoff)
    values, right = squares[seen] ** 0.5, vectors[:, seen]
    turned = (right * values).T
    parts = [turned[:, at : at + columns] for at in range(0, columns * len(full), columns)]
    return together @ (right / values), parts


def _seen(squares: Array, cutoff: float) -> Array:
    return squares > max(cutoff, 1e-8 * max(float(squares[-1]), 0.0) ** 0.5) ** 2


def wide(matrix: Array, xp: Any) -> Array:
    """The matrix in float64."""
    return xp.asarray(matrix, dtype=xp.float64)


def rows_of(matrix: Array) -> Iterator[slice]:
    """Blocks of rows, so that few rows are in float64 at a time."""
    return (slice(start, start + ROWS) for start in range(0, matrix.shape[0], ROWS))
