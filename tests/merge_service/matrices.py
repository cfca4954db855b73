"""Matrices for techniques that depend on singular values, and their decompositions by LAPACK in float64."""

import numpy as np
import pytest

SHAPES = [(24, 24), (40, 16), (16, 40), (5000, 6), (6, 5000), (1, 7), (7, 1), (1, 1)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
EXACT = {"rtol": 0, "atol": 3e-6}


def matrix(shape: tuple[int, int], seed: int = 0, rank: int | None = None) -> np.ndarray:
    """A float32 task vector of norm 1; of the given rank, up to its own rounding."""
    draw = np.random.default_rng(seed)
    if rank is None:
        full = draw.standard_normal(shape)
    else:
        full = draw.standard_normal((shape[0], rank)) @ draw.standard_normal((rank, shape[1]))
    return (full / np.linalg.norm(full)).astype(np.float32)


def rotation(size: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def spectrum(array: np.ndarray) -> np.ndarray:
    return np.linalg.svd(array.astype(float), compute_uv=False)


def svd(array: np.ndarray, full: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    left, values, right = np.linalg.svd(array.astype(float), full_matrices=full)
    return left, values, right.T
