"""What is wrong with a path where a file is needed, for messages.

It exists because "does not exist" misleads about a directory, a pipe, or a link whose target is gone.

Invariant: nothing is opened, so a pipe without a writer does not block.
"""

from pathlib import Path


def absence(path: Path) -> str:
    """The rest of a sentence that begins with a path which is no regular file."""
    if path.is_dir():
        return "is a directory"
    if path.exists():
        return "is neither a file nor a directory"
    if path.is_symlink():
        return f"is a link to {path.readlink()}, which does not exist"
    return "does not exist"
