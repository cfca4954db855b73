"""Parameters of techniques as data: what each may be, and the one place where a value is judged.

Invariant: a validated value is a plain JSON value in one canonical form (a number given as 1 or 1.0 comes out alike), so
that equal merges have equal parameters and hash alike.
"""

import difflib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from merge_service.errors import TechniqueError

BOTH = frozenset({"merge", "fold"})
Kind = Literal["float", "int", "bool", "choice", "floats"]


@dataclass(frozen=True)
class Param:
    """One parameter: its default, range, meaning, and the forms it speaks to.

    `low` and `high` bound numbers inclusively, unless `above_low` excludes the lower end. A `floats` parameter is a
    list of numbers or None.
    """

    name: str
    kind: Kind
    default: Any
    doc: str
    low: float | None = None
    high: float | None = None
    above_low: bool = False
    choices: tuple[str, ...] = ()
    forms: frozenset[str] = BOTH

    @property
    def range(self) -> str:
        """The allowed values, for people."""
        if self.kind == "choice":
            return " | ".join(self.choices)
        if self.kind == "bool":
            return "true | false"
        if self.low is None and self.high is None:
            return "any number"
        left = "" if self.low is None else f"{self.low:g} {'<' if self.above_low else '<='} "
        right = "" if self.high is None else f" <= {self.high:g}"
        return f"{left}{'each' if self.kind == 'floats' else 'x'}{right}"

    def validate(self, value: Any, owner: str) -> Any:
        """The canonical form of `value`; raises `TechniqueError` naming the technique, the parameter and the range."""
        if self.kind == "floats":
            return self._list(value, owner)
        if self.kind == "choice":
            return self._choice(value, owner)
        if self.kind == "bool":
            if not isinstance(value, bool):
                raise self._wrong(value, owner)
            return value
        return self._number(value, owner)

    def _number(self, value: Any, owner: str) -> float | int:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(value, owner)
        too_low = self.low is not None and (value < self.low or (self.above_low and value == self.low))
        too_high = abs(value) > sys.float_info.max or (self.high is not None and value > self.high)
        if too_low or too_high or value != value or (self.kind == "int" and value != int(value)):
            raise self._wrong(value, owner)
        return int(value) if self.kind == "int" else float(value) + 0.0

    def _choice(self, value: Any, owner: str) -> str:
        if value not in self.choices:
            raise self._wrong(value, owner, nearest(str(value), self.choices))
        return str(value)

    def _list(self, value: Any, owner: str) -> list[float] | None:
        if value is None:
            return None
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise self._wrong(value, owner)
        numbers = [float(self._number(item, owner)) for item in value]
        if not any(numbers):
            raise TechniqueError(f"{owner}: {self.name} = {value!r} has no weight above zero")
        return numbers

    def _wrong(self, value: Any, owner: str, hint: str = "") -> TechniqueError:
        what = {"float": "a number", "int": "a whole number", "floats": "a list of numbers"}.get(
            self.kind, "one"
        )
        return TechniqueError(f"{owner}: {self.name} = {value!r} is not {what} of: {self.range}{hint}")


def nearest(word: str, among: Iterable[str]) -> str:
    """'; did you mean X?' or nothing."""
    found = difflib.get_close_matches(word.lower().replace("-", "_"), list(among), n=1)
    return f"; did you mean {found[0]}?" if found else ""
