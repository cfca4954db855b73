"""The report of a merge: `merge_service.merging.report`, under its documented name."""

from merge_service.merging.report import MergeReport

__all__ = ["MergeReport"]
