"""Numbers that were measured on data for one set of weights, as files beside the weights: Gram matrices, Fisher information.

Used from outside: `Statistics` (an open file), `write` (a new one), `pooled` (files of parts of the data as one), `beside` (the
file that belongs to an expert), `KINDS`.
"""

from merge_service.statistics.artifact import KINDS, MEASURED, About, Statistics, beside, pooled, write

__all__ = ["KINDS", "MEASURED", "About", "Statistics", "beside", "pooled", "write"]
