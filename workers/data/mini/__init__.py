"""The mini suite of the demo: twelve small sets of real pictures from ordinary pip packages.

`suite` writes the complete suite or nothing. `drawings`, `emoji`, `fonts` and `scans` make the sets from files that `packages` finds.
`alike` and `scan` keep similar pictures out of different splits. Used from outside: `build`, `EDITION` and `ROLES`.
"""

from merge_service.moved import names_from
from workers.data.mini.suite import EDITION, ROLES, build

__all__ = ["EDITION", "ROLES", "build"]

__getattr__ = names_from("workers.data.mini.suite")
