"""What a step made, for whoever commits it.

Invariant: a sha256 in here was computed from the very bytes that were written, so nobody has to read the file for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Made:
    """The result of a step, plain JSON, and the sha256 of its files as far as they were hashed while they were written, by name."""

    result: Mapping[str, Any]
    sha256: Mapping[str, str] = field(default_factory=dict)
