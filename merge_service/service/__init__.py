"""Experts that arrive from anywhere, in any order, and the merged models that are served in time-step order.

`MergeService` is plain Python over paths; `Merger` is the part of it that a Ray actor carries out for studies.
"""

from merge_service.moved import names_from
from merge_service.service.actors import Merger
from merge_service.service.service import Arrival, MergeService, Moment

__all__ = [
    "Arrival",
    "MergeService",
    "Merger",
    "Moment",
]

__getattr__ = names_from("merge_service.service.service")
