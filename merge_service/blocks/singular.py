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
from collections.abc import Iterator
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


def wide(matrix: Array, xp: Any) -> Array:
    """The matrix in float64."""
    return xp.asarray(matrix, dtype=xp.float64)


def rows_of(matrix: Array) -> Iterator[slice]:
    """Blocks of rows, so that few rows are in float64 at a time."""
    return (slice(start, start + ROWS) for start in range(0, matrix.shape[0], ROWS))
