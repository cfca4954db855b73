"""One merge, carried out block by block: what happens to each tensor, which numbers must be known first, and the writing.

A merge may be split over processes (`Split`), and its thresholds may be kept for the next one (`keep_limits`); neither changes a byte
of the result.
"""

from merge_service.engine.split import Part, PartWorker, Split
from merge_service.engine.thresholds_cache import keep_limits, limits_rule
from merge_service.moved import names_from

__all__ = [
    "Part",
    "PartWorker",
    "Split",
    "keep_limits",
    "limits_rule",
]

__getattr__ = names_from("merge_service.blocks.spans")
