"""What a merge says of itself: `merge_service.merging.report`, under its documented name."""

from merge_service.merging.report import MergeReport

__all__ = ["MergeReport"]
