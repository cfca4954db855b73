"""What a person sees while a study runs: a live view on a terminal, plain lines elsewhere.

Invariant: showing never changes or delays the work; whatever is shown is read from records and progress files.
"""

import itertools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.kinds.table import KINDS
from pipeline.plan.steps import VAL, Plan, TrajectoryPlan
from pipeline.results.over_time import gm, ka, zs
from pipeline.store.artifact import Record

SHOWN = 20
"""Trajectories in the live view: those that were scored last."""
NOTES = 5
"""Notes in the live view: the newest."""
REDRAW_SECONDS = 0.25


class Standings:
    """How far each trajectory has been scored, kept up to date evaluation by evaluation."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self.splits = plan, plan.splits
        self._users: dict[str, list[tuple[TrajectoryPlan, int]]] = {}
        self._rows: dict[str, tuple[int, float | None]] = {}
        self._places = {trajectory.id: place for place, trajectory in enumerate(plan.trajectories)}
        for trajectory in plan.trajectories:
            for point in trajectory.points:
                self._users.setdefault(point.evaluate, []).append((trajectory, point.t))

    def scored(self, evaluation: str, scores: Mapping[str, float]) -> None:
        """An evaluation is done: whoever it belongs to stands at its t, unless it stood further on already."""
        score = gm(ka(scores, self._plan.adaptation), zs(scores, self._plan.held_out))
        for trajectory, t in self._users.get(evaluation, ()):
            if t >= self._rows.get(trajectory.id, (0, None))[0]:
                self._rows.pop(trajectory.id, None)
                self._rows[trajectory.id] = (t, score)

    def finished(self, record: Record) -> None:
        """A step is done, perhaps long ago; only scores count here."""
        if KINDS[record.kind].scores:
            self.scored(record.fingerprint, record.result["scores"])

    def rows(self) -> list[tuple[str, int, int, float | None]]:
        """(trajectory, newest t scored, number of tasks, GM there), in the study's order: those scored last, then the first."""
        chosen = dict.fromkeys(itertools.islice(reversed(self._rows), SHOWN))
        chosen |= dict.fromkeys(itertools.islice(self._places, max(0, SHOWN - len(chosen))))
        places = sorted(self._places[name] for name in chosen)
        shown = [self._plan.trajectories[place] for place in places]
        known = [(one, *self._rows.get(one.id, (0, None))) for one in shown]
        return [(one.id, t, len(one.stream), score) for one, t, score in known]

    @property
    def hidden(self) -> int:
        """How many trajectories are left out at least."""
        return max(0, len(self._places) - SHOWN)


class Progress:
    """Counts, per-step rates with ETA, and per-trajectory t and last GM."""

    def __init__(
        self, total: int, done: int, scratch: Path, standings: Standings, console: Console | None = None
    ) -> None:
        self.total, self.done, self.scratch, self.standings = total, done, scratch, standings
        self.console = console or Console(stderr=True)
        self.running: dict[str, str] = {}
        self._began: dict[str, float] = {}
        self._notes: dict[str, str] = {}
        self._drawn = 0.0
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.update(self._view(), refresh=True)
            self._live.stop()

    def note(self, text: str, about: str = "") -> None:
        """Something a person should know now; on a terminal it stays until it is `settled`, or another note is about the same."""
        if self._live:
            self._notes.pop(about, None)
            self._notes[about] = text
            self.tick()
        else:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def settled(self, about: str) -> None:
        """What a note was about is no longer so."""
        if self._notes.pop(about, None) is not None:
            self.tick()

    def started(self, fingerprint: str, label: str) -> None:
        self.running[fingerprint] = label
        self._began[fingerprint] = time.monotonic()
        self.tick()

    def finished(self, fingerprint: str, summary: str) -> None:
        label = self.running.pop(fingerprint)
        seconds = time.monotonic() - self._began.pop(fingerprint)
        self.done += 1
        self._notes.pop(fingerprint, None)
        if self._live is None:
            self.console.print(
                f"[{self.done}/{self.total}] {label}: {summary} ({seconds:.1f} s)",
                highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip
        self.tick()

    def put_back(self, fingerprint: str, why: str) -> None:
        """A step did not end and will run again."""
        label = self.running.pop(fingerprint, fingerprint[:16])
        self._began.pop(fingerprint, None)
        self.note(f"{label}: {why}; trying again", about=fingerprint)

    def tick(self) -> None:
        """Draw anew, unless that was done a moment ago."""
        if self._live and time.monotonic() - self._drawn > REDRAW_SECONDS:
            self._live.update(self._view(), refresh=True)
            self._drawn = time.monotonic()

    def _view(self) -> Group:
        now = time.monotonic()
        running = [
            (label, read_progress(self.scratch, fingerprint), now - self._began[fingerprint])
            for fingerprint, label in self.running.items()
        ]
        head = Text(f"{self.done} of {self.total} steps done", style="bold")
        notes = [Text(note) for note in list(self._notes.values())[-NOTES:]]
        standings = standings_table(self.standings.rows(), self.standings.hidden, self.standings.splits)
        return Group(head, *notes, standings, running_table(running))


def running_table(running: Iterable[tuple[str, Mapping[str, Any], float]]) -> Table:
    """Steps under way: (label, what its worker wrote, seconds since it began) each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("running", "steps", "rate", "eta", "loss"):
        table.add_column(column, justify="left" if column == "running" else "right")
    for label, progress, elapsed in running:
        table.add_row(Text(label), *training_columns(progress, elapsed))
    return table


def standings_table(
    rows: Iterable[tuple[str, int, int, float | None]], hidden: int, splits: Sequence[str] = ()
) -> Table:
    """Trajectories as `Standings.rows` gives them, how many are left out, and the splits that are scored."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("trajectory", "t", "GM on val" if tuple(splits) == (VAL,) else "GM"):
        table.add_column(column, justify="left" if column == "trajectory" else "right")
    for name, t, tasks, score in rows:
        table.add_row(Text(name), f"{t}/{tasks}", "" if score is None else f"{score:.3f}")
    if hidden:
        table.add_row(f"and {hidden} more", "", "", style="dim")
    return table


def read_progress(scratch: Path, fingerprint: str) -> Mapping[str, Any]:
    """What the worker of a step last wrote about itself; empty if it writes nothing."""
    try:
        answer = json.loads((scratch / fingerprint / "progress.json").read_text())
    except (OSError, ValueError):
        return {}
    return answer if isinstance(answer, dict) else {}


def training_columns(progress: Mapping[str, Any], elapsed: float) -> tuple[str, str, str, str]:
    """Steps done, samples per second, time left and loss of an expert in training, as text; `elapsed` in seconds."""
    if not progress.get("steps"):
        return ("", "", "", "")
    step, steps, rate = int(progress["step"]), int(progress["steps"]), float(progress.get("rate") or 0)
    eta = f"{elapsed * (steps - step) / step:.0f} s" if step else ""
    loss = progress.get("loss")
    return (
        f"{step}/{steps}",
        f"{rate:.0f}/s" if rate else "",
        eta,
        f"{loss:.3f}" if loss is not None else "",
    )


def outlook(summary: dict[str, Any]) -> str:
    """What is ahead, and what sharing saves, in one line."""
    kinds = [
        f"{counts['unique']} {kind} ({counts['naive']} one by one, {counts['cached']} in store)"
        for kind, counts in summary["steps"].items()
    ]
    return f"{summary['study']}: {summary['trajectories']} trajectories; steps: {', '.join(kinds)}"
