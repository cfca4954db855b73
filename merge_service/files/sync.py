"""Makes files, directories, and names in a directory, survive a power failure.

Syncing a file makes its bytes durable. Its name is part of the directory, which must be synced as well.

Invariant: a failed sync is an error, except on file systems that cannot sync a directory.
"""

import errno
import os
from pathlib import Path


def sync_file(path: Path) -> None:
    """Force the bytes of a file to disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_directory(directory: Path) -> None:
    """Force the names in a directory to disk.

    EINVAL means that the file system cannot sync directories (fsync(2)); names are then as durable as it makes them. Every other
    error is raised, above all EIO, after which a name may be lost.
    """
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)


def make_directory(directory: Path) -> None:
    """Make a directory, and those above it that are missing, with names that are on disk. Raises OSError."""
    if not directory.is_dir():
        make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        sync_directory(directory.parent)
