"""Paths as people write them: with `~` and environment variables, replaced where a study or a command is read.

Invariant: what is left of a path holds neither; a variable that is not set is a mistake that is named, never an empty string.
"""

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

SCHEMES = ("local-dir:",)
LONGEST_PART = 255
_VARIABLE = re.compile(r"\$(?:\{([^{}]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def expanded(path: str) -> str:
    """`path` with `~`, `~user`, `$NAME` and `${NAME}` replaced. Raises ValueError naming what cannot be."""
    scheme = next((scheme for scheme in SCHEMES if path.startswith(scheme)), "")
    text = _VARIABLE.sub(
        lambda found: _value(path, found.group(1) or found.group(2) or ""), path[len(scheme) :]
    )
    if not text.startswith("~"):
        return scheme + text
    try:
        return scheme + str(Path(text).expanduser())
    except RuntimeError:
        raise ValueError(
            f"{path!r} begins with a home directory that this machine does not know; write it out (./~... for a file of that name)"
        ) from None


def _value(path: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{path!r}: ${{{name}}} is not the name of an environment variable; ${{NAME}} is replaced, and nothing else within the braces"
        )
    value = os.environ.get(name)
    if not value:
        raise ValueError(
            f"{path!r}: the environment variable {name} is {'empty' if value == '' else 'not set'}; set it, or write the path out"
        )
    return value


def _findable(value: str) -> str:
    if any(len(part.encode()) > LONGEST_PART for part in value.split("/")):
        raise ValueError(f"{value[:60]!r}... has a part of more than {LONGEST_PART} bytes; no path has")
    return value


Place = Annotated[
    str, Field(min_length=1, max_length=1024), AfterValidator(expanded), AfterValidator(_findable)
]
"""A path, or a name that may be one, in a study file."""
