"""placeholder until fomo lands"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Suite:
    roles: dict[str, tuple[str, ...]]
    dates: dict[str, Any]


def read_suite_file(path: Path) -> Suite:
    raise NotImplementedError
