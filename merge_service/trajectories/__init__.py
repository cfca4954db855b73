"""Averages along one training run: of the last checkpoints, by windows and shapes of weights, all of them in one pass.

`shapes` has the weights, `averages` says which models are made of which checkpoints, `passing` makes them.
"""

from merge_service.trajectories.averages import Average, averages_of, in_order, step_of
from merge_service.trajectories.passing import Made, Places, average_along
from merge_service.trajectories.shapes import SHAPES, weights_of

__all__ = [
    "SHAPES",
    "Average",
    "Made",
    "Places",
    "average_along",
    "averages_of",
    "in_order",
    "step_of",
    "weights_of",
]
