"""Experts that arrive in any order and from anywhere, and merged models that are served in time-step order.

`MergeService` is plain Python over paths; `Merger` is the part of it that a Ray actor runs for studies. `Folder` makes the merges of a
live service, whose sequence of experts grows and loses some.
"""

from merge_service.moved import names_from
from merge_service.service.actors import Merger
from merge_service.service.sequence import Folder, Origin, Place
from merge_service.service.service import Arrival, MergeService, Moment

__all__ = [
    "Arrival",
    "Folder",
    "MergeService",
    "Merger",
    "Moment",
    "Origin",
    "Place",
]

__getattr__ = names_from("merge_service.service.service")
