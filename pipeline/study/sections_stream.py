"""The `stream` section of a study file: the order in which tasks arrive.

Invariant: a key that has no effect in the chosen order is an error.
"""

import re
from contextlib import suppress
from datetime import date
from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.study.places import Place
from pipeline.study.sections import Name, Section, SomeNames

_PERIOD = re.compile(r"[0-9]{4}(-[0-9]{2}){0,2}")

Order = Literal["dataset_incremental", "random", "performance", "similarity", "frequency", "time"]
MEASURED = ("performance", "similarity")
"""Orders that depend on measurements of the classes with the base model."""
DRAWN = ("random", "frequency", "time")
"""Orders that draw with `stream.seed`: the whole order, the ties, or the classes of one period."""


class StreamSection(Section):
    """The order in which tasks arrive, and their number; or `file`, a saved stream, which defines both.

    dataset_incremental makes every dataset one task, in the order of `tasks`. With `chunks`, the classes of all
    datasets of `tasks` (default: every adaptation set) are sorted by `order` and cut into that many tasks.
    """

    order: Order = "dataset_incremental"
    tasks: SomeNames | None = None
    chunks: int | None = Field(default=None, ge=1, le=1_000_000)
    seed: int = Field(default=0, ge=0, lt=2**31)
    reverse: bool = False
    table: Place | None = None
    dates: dict[Name, int | str] | None = None
    file: Place | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        problem = self._not_beside_file() if self.file is not None else self._misfit()
        if problem:
            raise ValueError(problem)
        return self

    @property
    def measured(self) -> bool:
        """Whether the stream depends on measurements with the base model."""
        return self.file is None and self.order in MEASURED

    @property
    def periods(self) -> dict[str, tuple[int, ...]]:
        """`dates` as tuples that sort by time: (year,), (year, month) or (year, month, day), the same form for all."""
        return {name: period(value) for name, value in (self.dates or {}).items()}

    def _not_beside_file(self) -> str:
        fields = {name: field.default for name, field in type(self).model_fields.items() if name != "file"}
        given = [name for name, default in fields.items() if getattr(self, name) != default]
        return f"file is a whole stream by itself; remove {', '.join(given)}, or remove file" if given else ""

    def _misfit(self) -> str:
        if self.order != "dataset_incremental" and self.chunks is None:
            return f"order: {self.order} orders classes; give chunks, the number of tasks to cut them into"
        if self.order == "frequency" and self.table is None:
            return "order: frequency needs table, a file with a count for every class name"
        for key, order in (("table", "frequency"), ("dates", "time")):
            if self.order != order and getattr(self, key) is not None:
                return f"{key} bears on order: {order} only, not on {self.order}; remove it"
        if self.seed and self.order not in DRAWN:
            return f"order: {self.order} draws nothing, so seed: {self.seed} would change nothing; remove it"
        if len({len(value) for value in self.periods.values()}) > 1:
            return "dates mixes years with months or days, which have no order; write all of them alike"
        return ""


def period(value: int | str) -> tuple[int, ...]:
    """A year or an ISO date as (year,), (year, month) or (year, month, day). Raises ValueError."""
    text = str(value).zfill(4)
    if _PERIOD.fullmatch(text):
        numbers = tuple(int(part) for part in text.split("-"))
        with suppress(ValueError):
            year, month, day = (*numbers, 1, 1)[:3]
            date(year, month, day)
            return numbers
    raise ValueError(f"dates: {value!r} is no year or ISO date; write 2009, 2009-06 or 2009-06-30")
