"""Vectors for techniques that depend on angles: golden ones, and three that cancel out."""

import math

import numpy as np

BASE = np.array([0.5, -1, 2, 0.25, -0.75, 1.5, 0.125, -2, 1, -0.5])
TAUS = np.array(
    [
        [1, -0.5, 0.25, 2, -0.125, 0.75, 0, -1.5, 0.0625, 0.375],
        [0.5, 0.75, -0.25, -1, 0.125, 0.875, 1.25, -0.375, 0, -2],
        [-0.25, 1.5, 0.5, -1, 0.625, -0.0625, -0.75, 0.125, 2, 0.3125],
    ]
)
TRIANGLE = np.array([[1, 0], [-0.5, math.sqrt(0.75)], [-0.5, -math.sqrt(0.75)]])


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)
