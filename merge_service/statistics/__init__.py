"""Numbers that were measured on data for one set of weights, as files beside the weights: Gram matrices, Fisher
information; and coefficients that were learned for all experts of a merge.

Used from outside: `Statistics` (an open file), `Numbers` (what was found, in memory), `write` (a new one), `pooled` (files of parts of the data as one), `beside` (the
file that belongs to an expert), `KINDS`.
"""

from merge_service.statistics.artifact import (
    COEFFICIENTS,
    KINDS,
    MEASURED,
    About,
    Numbers,
    Statistics,
    beside,
    pooled,
    write,
)

__all__ = ["COEFFICIENTS", "KINDS", "MEASURED", "About", "Numbers", "Statistics", "beside", "pooled", "write"]
