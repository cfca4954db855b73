"""Progress of a run in a notebook: one output that is updated during the run.

Invariant: IPython is used only if the program already runs in it, and is never imported otherwise.
"""

import html
import sys
from typing import Any

from pipeline.run.progress import Moment, clock, training_columns

BAR_STYLE = "width:24em;vertical-align:middle"


def bar_of_notebook() -> "NotebookBar | None":
    """The progress view for the notebook that this program runs in; None elsewhere."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    return NotebookBar() if shell is not None and hasattr(shell, "kernel") else None


class NotebookBar:
    """A callback for `temporal_merge.run` that replaces its output at every moment."""

    def __init__(self) -> None:
        self._handle: Any = None

    def __call__(self, moment: Moment) -> None:
        from IPython.display import HTML, display

        shown = HTML(as_html(moment))
        if self._handle is None:
            self._handle = display(shown, display_id=True)
        else:
            self._handle.update(shown)


def as_html(moment: Moment) -> str:
    """A moment as HTML: the bar of the whole run, notes, running steps, the progress of trajectories."""
    head = f"{moment.done} of {moment.total} steps done"
    parts = [
        f"<div><b>{head}</b> <progress max='1' value='{moment.share:.4f}' style='{BAR_STYLE}'></progress> {clock(moment)}</div>",
        *(f"<div>{html.escape(note)}</div>" for note in moment.notes),
    ]
    running = [[label, *training_columns(said)] for label, said, _ in moment.running]
    standings = [
        [name, f"{t}/{tasks}", "" if score is None else f"{score:.3f}"]
        for name, t, tasks, score in moment.standings
    ]
    parts.append(table(["running", "steps", "rate", "left", "loss"], running))
    parts.append(table(["trajectory", "t", "GM"], standings))
    return "".join(parts)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """An HTML table; empty text for no rows."""
    if not rows:
        return ""
    head = "".join(f"<th style='text-align:left'>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
