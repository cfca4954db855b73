"""Names in a directory that survive a power cut.

Syncing a file keeps its bytes. The name that leads to them is part of the directory, which must be synced as well.

Invariant: what cannot be synced is an error, except where a file system has no way to sync a directory.
"""

import errno
import os
from pathlib import Path


def sync_directory(directory: Path) -> None:
    """Force the names in a directory to disk.

    EINVAL says that the file system cannot sync directories (fsync(2)): names are then as safe as it makes them. Every other error
    is raised, above all EIO, after which a name may be lost.
    """
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)
