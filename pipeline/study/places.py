"""Paths in a study: `~` and environment variables are replaced when it is read, and what no file can be called is refused."""

from typing import Annotated

from pydantic import AfterValidator, Field

from pipeline.files.paths import expanded

LONGEST_PART = 255


def _findable(value: str) -> str:
    if any(len(part.encode()) > LONGEST_PART for part in value.split("/")):
        raise ValueError(f"{value[:60]!r}... has a part of more than {LONGEST_PART} bytes; no path has")
    return value


Place = Annotated[
    str, Field(min_length=1, max_length=1024), AfterValidator(expanded), AfterValidator(_findable)
]
"""A path in a study file, or a name that may be one."""


def _no_address(value: str) -> str:
    if "://" in value:
        raise ValueError(
            f"it is an address ({value.partition('://')[0][:20]}://...), and a data root is a folder; mount the bucket as a "
            "folder that every node sees, or copy the shards, and give that folder"
        )
    return value


Folder = Annotated[Place, AfterValidator(_no_address)]
"""A folder of shards in a study file."""
