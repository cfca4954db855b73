"""Single figures of a report for a notebook: charts that contain their own data.

Invariant: a plot is the figure of that name in the report, drawn from the same rows.
"""

from collections.abc import Callable, Mapping
from typing import Any

import altair as alt

from merge_service.errors import UserError
from pipeline.report import figures
from pipeline.report.figures import Data, Figure, NoData
from pipeline.report.page import frames_of, records, spec_of
from pipeline.results.over_time import on_split, splits_of

PLOTS: dict[str, Callable[[Data], Figure]] = {"plane": figures.plane, "over_time": figures.over_time}


def plot(answer: Mapping[str, Any], name: str, split: str | None = None) -> Any:
    """The altair chart `name` (one of `PLOTS`) of results.json, on one split (default: the first that is scored).

    Raises UserError if the results have nothing to draw yet, or hold no such split.
    """
    splits = splits_of(answer)
    if split not in (None, *splits):
        raise UserError(f"split = {split!r}: the study is scored on {' and '.join(splits)}")
    try:
        data = figures.prepare([on_split(answer, split or splits[0])])
        figure = PLOTS[name](data)
    except NoData as why:
        raise UserError(f"there is nothing to plot yet: {why}; run the study further") from None
    frames = frames_of(data, [figure])
    held = {one: records(frames[one]) for one in figure.data}
    return alt.Chart.from_dict({**spec_of(figure), "title": figure.title, "datasets": held})
