"""Temporary files, renamed when complete, and files read through memory maps or, if they are remote, by range.

A reader of a name finds all of the file or none. Temporary files of a dead process are removed by the next writer; those of a
live process are never touched.
"""

from merge_service.files import web
from merge_service.files.absent import absence
from merge_service.files.leftovers import (
    is_abandoned,
    is_parts_folder,
    owner_mark,
    sweep,
    sweep_directory,
    temporary,
)
from merge_service.files.made import Made
from merge_service.files.ranges import far, is_far
from merge_service.files.sync import make_directory, sync_directory, sync_file
from merge_service.files.whole import prepared, replace_whole

__all__ = [
    "Made",
    "absence",
    "far",
    "is_abandoned",
    "is_far",
    "is_parts_folder",
    "make_directory",
    "owner_mark",
    "prepared",
    "replace_whole",
    "sweep",
    "sweep_directory",
    "sync_directory",
    "sync_file",
    "temporary",
    "web",
]
