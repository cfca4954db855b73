"""Merging checkpoints: the five functions of `merge_service.merging`, under their documented name."""

from merge_service.merging.combine import advance, fold, merge, replace, retract
from merge_service.merging.report import MergeReport

__all__ = ["MergeReport", "advance", "fold", "merge", "replace", "retract"]
