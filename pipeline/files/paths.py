"""Paths with `~` and environment variables, as people write them.

Invariant: an expanded path contains neither. A variable that is not set is an error that names it, never an empty
string.
"""

import os
import re
from pathlib import Path

SCHEMES = ("local-dir:",)
_VARIABLE = re.compile(r"\$(?:\{([^{}]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def expanded(path: str) -> str:
    """`path` with `~`, `~user`, `$NAME` and `${NAME}` replaced. Raises ValueError, which names what cannot be replaced."""
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
