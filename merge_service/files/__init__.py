"""Files on their way to a name, and files read where they lie.

A file is written under a temporary name beside its place and renamed when it is complete, so that whoever opens a name finds all of
the file or none. What a dead writer left is removed by the next one; what a live one holds is never touched.
"""

from merge_service.files.leftovers import is_abandoned, owner_mark, sweep, sweep_directory, temporary
from merge_service.files.sync import sync_directory

__all__ = [
    "is_abandoned",
    "owner_mark",
    "sweep",
    "sweep_directory",
    "sync_directory",
    "temporary",
]
