"""The figures of a report, one function each, over the frames of `pipeline.report.data`.

Invariant: a figure without data raises `NoData` with the reason and is never drawn empty. Every chart refers to its data by name,
so that a page holds each row once, and gets its rows with the filters applied. Scores are fractions in [0, 1].
"""

from pipeline.report.data import Data, NoData, prepare
from pipeline.report.figures.comparisons import price, sharing, spread, transfer
from pipeline.report.figures.grids import difference, matrix, similarity, techniques
from pipeline.report.figures.over_time import forgetting, over_time, plane, scaling, training
from pipeline.report.style import Figure

__all__ = [
    "Data", "Figure", "NoData", "difference", "forgetting", "matrix", "over_time", "plane", "prepare", "price", "scaling",
    "sharing", "similarity", "spread", "techniques", "training", "transfer",
]  # fmt: skip
