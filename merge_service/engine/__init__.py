"""One merge, block by block: what happens to each tensor, which statistics must be known first, and writing.

A merge may be split over processes (`Split`), and its thresholds may be kept for the next one (`keep_thresholds`); neither
changes a byte of the result.
"""

from merge_service.engine.assembly import Execution
from merge_service.engine.split import Part, PartWorker, Split
from merge_service.engine.thresholds_cache import keep_thresholds, thresholds_rule
from merge_service.moved import names_from

__all__ = [
    "Execution",
    "Part",
    "PartWorker",
    "Split",
    "keep_thresholds",
    "thresholds_rule",
]

__getattr__ = names_from("merge_service.blocks.spans")
