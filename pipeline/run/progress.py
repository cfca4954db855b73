"""The progress of a study on the screen: a live view on a terminal, plain lines elsewhere.

Invariant: the display never changes or delays the work; everything shown is read from records and progress files.
"""

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, TypedDict, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.console import WARNING
from pipeline.kinds.table import KINDS
from pipeline.plan.steps import VAL, Plan, Summary, TrajectoryPlan
from pipeline.results.over_time import gm, ka, zs
from pipeline.run.timing.pace import Pace, duration
from pipeline.store.artifact import Record

SHOWN = 20
"""Trajectories in the live view: those scored last."""
NOTES = 5
"""Notes in the live view: the newest."""
REDRAW_SECONDS = 0.25
RECKON_SECONDS = 2.0
"""How often the time left is computed, which visits every step of the plan; it counts down in between."""
BAR = 40
"""Width of the progress bar of the whole run, in characters."""
TROUBLES = {
    "retry": ("step tried again", "steps tried again"),
    "lost": (
        "step begun again after a worker or an input was lost",
        "steps begun again after workers or inputs were lost",
    ),
}
"""Events that are counted to the end of a run, by kind."""


class TrainingProgress(TypedDict, total=False):
    """The progress file of an expert's worker (`workers.training.checkpoints.Progress`); `rate` is in samples per second."""

    step: int
    steps: int
    samples: int
    rate: float
    loss: float | None


Running = tuple[str, TrainingProgress, float]
Row = tuple[str, int, int, float | None]
Said = TrainingProgress
"""The newest progress file of a step's worker."""
Tell = Callable[["Moment"], None]


class Standings:
    """The newest scored t of each trajectory, updated with every evaluation."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self.splits = plan, plan.splits
        self._users: dict[str, list[tuple[TrajectoryPlan, int]]] = {}
        self._rows: dict[str, tuple[int, float | None]] = {}
        self._places = {trajectory.id: place for place, trajectory in enumerate(plan.trajectories)}
        for trajectory in plan.trajectories:
            for point in trajectory.points:
                self._users.setdefault(point.evaluate, []).append((trajectory, point.t))

    def scored(self, evaluation: str, scores: Mapping[str, float]) -> None:
        """Record an evaluation: its trajectories move to its t, unless they are further already."""
        score = gm(ka(scores, self._plan.adaptation), zs(scores, self._plan.held_out))
        for trajectory, t in self._users.get(evaluation, ()):
            if t >= self._rows.get(trajectory.id, (0, None))[0]:
                self._rows.pop(trajectory.id, None)
                self._rows[trajectory.id] = (t, score)

    def finished(self, record: Record) -> None:
        """Record a finished step; only scores matter here."""
        if KINDS[record.kind].scores:
            self.scored(record.fingerprint, record.result["scores"])

    def rows(self) -> list[Row]:
        """(trajectory, newest t scored, number of tasks, GM there), in the study's order: those scored last, then the first ones."""
        chosen = dict.fromkeys(itertools.islice(reversed(self._rows), SHOWN))
        chosen |= dict.fromkeys(itertools.islice(self._places, max(0, SHOWN - len(chosen))))
        places = sorted(self._places[name] for name in chosen)
        shown = [self._plan.trajectories[place] for place in places]
        known = [(one, *self._rows.get(one.id, (0, None))) for one in shown]
        return [(one.id, t, len(one.stream), score) for one, t, score in known]

    @property
    def hidden(self) -> int:
        """The least number of trajectories that are left out."""
        return max(0, len(self._places) - SHOWN)


@dataclass(frozen=True)
class Moment:
    """The state of a run at one moment, for a terminal, a notebook, `status` and callbacks.

    `elapsed` and `remaining` are in seconds; `remaining` is None while nothing was measured. `share` is the part of all work that
    is done, in [0, 1]. `running` are (label, progress file of its worker, seconds since it began) of running steps, `standings`
    (trajectory, newest t scored, number of tasks, GM there) of the trajectories scored last, of which `hidden` more are left out.
    `notes` apply at present; `troubles` counts retries and losses.
    """

    done: int
    total: int
    elapsed: float
    remaining: float | None = None
    share: float = 0.0
    running: tuple[Running, ...] = ()
    standings: tuple[Row, ...] = ()
    hidden: int = 0
    splits: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    troubles: Mapping[str, int] = field(default_factory=dict)


class Progress:
    """The progress of a run, shown on every change: on a terminal, by a callback, or as a line per finished step."""

    def __init__(
        self,
        pace: Pace,
        done: Set[str],
        scratch: Path,
        standings: Standings,
        console: Console | None = None,
        tell: Tell | None = None,
    ) -> None:
        self.pace, self._done, self.scratch, self.standings = pace, set(done), scratch, standings
        self.console, self._callback = console or Console(stderr=True), tell
        self.running: dict[str, str] = {}
        self._began: dict[str, float] = {}
        self._notes: dict[str, str] = {}
        self._troubles: Counter[str] = Counter()
        self._start, self._drawn, self._now = time.monotonic(), 0.0, time.monotonic
        self._reckoned: tuple[float, float | None, float] | None = None
        shown = self.console.is_terminal and tell is None
        self._live = Live(console=self.console, auto_refresh=False) if shown else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._draw()
        if self._live:
            self._live.stop()

    def note(self, text: str, about: str = "") -> None:
        """Show a note. In a view it stays until it is `settled`, or until another note with the same `about` replaces it."""
        self._notes.pop(about, None)
        self._notes[about] = text
        if self._has_view:
            self.tick()
        else:
            self._print(text)

    def settled(self, about: str) -> None:
        """Remove the note with this `about`."""
        if self._notes.pop(about, None) is not None:
            self.tick()

    def started(self, fingerprint: str, label: str) -> None:
        """A step was given to its workers, which may still be starting."""
        self.running[fingerprint] = label
        self._began[fingerprint] = self._now()
        self.tick()

    def finished(self, fingerprint: str, summary: str, seconds: float | None = None) -> None:
        """A step is done; `seconds` is how long its workers took, if they ran here."""
        label = self.running.pop(fingerprint)
        waited = self._now() - self._began.pop(fingerprint)
        self._done.add(fingerprint)
        if seconds is not None:
            self.pace.took(fingerprint, seconds)
        self._notes.pop(fingerprint, None)
        if not self._has_view:
            took = waited if seconds is None else seconds
            self._print(
                f"[{len(self._done)}/{self.pace.total}] {label}: {summary} ({took:.1f} s){self._outlook()}"
            )
        self.tick()

    def put_back(self, fingerprint: str, why: str, kind: str = "retry") -> None:
        """A step did not complete and will run again; it is counted to the end of the run."""
        label = self.running.pop(fingerprint, fingerprint[:16])
        self._began.pop(fingerprint, None)
        self._troubles[kind] += 1
        self.note(f"{label}: {why}; trying again", about=fingerprint)

    def undone(self, fingerprint: str) -> None:
        """The artifact of a finished step is damaged, so the step must be repeated."""
        self._done.discard(fingerprint)

    def tick(self) -> None:
        """Redraw, unless the last drawing was a moment ago."""
        if self._has_view and self._now() - self._drawn > REDRAW_SECONDS:
            self._draw()

    def moment(self) -> Moment:
        """The present state."""
        now = self._now()
        running = tuple(
            (label, read_progress(self.scratch, fingerprint), now - self._began[fingerprint])
            for fingerprint, label in self.running.items()
        )
        at_work = {
            name: spent
            for name, (_, said, _) in zip(self.running, running)
            if (spent := worked(said, self.pace.seconds(name)))
        }
        left, share = self._reckon(at_work)
        done = len(self._done)
        return Moment(
            done, self.pace.total, now - self._start, 0.0 if done == self.pace.total else left, share if done < self.pace.total else 1.0,
            running, tuple(self.standings.rows()), self.standings.hidden, tuple(self.standings.splits),
            tuple(self._notes.values())[-NOTES:], dict(self._troubles),
        )  # fmt: skip

    @property
    def _has_view(self) -> bool:
        return self._live is not None or self._callback is not None

    def _reckon(self, running: Mapping[str, float]) -> tuple[float | None, float]:
        """Seconds left, and the part of the work that is done."""
        now, known = self._now(), self._reckoned
        if known is None or now - known[0] > RECKON_SECONDS or (known[1] is None and self.pace.measured):
            known = self._reckoned = (
                now,
                self.pace.left(self._done, running),
                self.pace.share(self._done, running),
            )
        at, left, share = known
        return (None if left is None else max(0.0, left - (now - at))), share

    def _outlook(self) -> str:
        left, _ = self._reckon({})
        return f", about {duration(left)} left" if left else ""

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _draw(self) -> None:
        self._drawn = self._now()
        if self._live:
            self._live.update(view(self.moment()), refresh=True)
        if self._callback:
            try:
                self._callback(self.moment())
            except Exception as error:  # a user's function may raise anything: the run continues without it
                self._callback = None
                self._print(
                    f"the progress callback has failed and is not called again ({type(error).__name__}: {error})"
                )


def view(moment: Moment) -> Group:
    """A moment as a terminal view."""
    notes = [Text(note) for note in moment.notes]
    standings = standings_table(moment.standings, moment.hidden, moment.splits)
    return Group(bar(moment), *troubles_of(moment.troubles), *notes, standings, running_table(moment.running))


def bar(moment: Moment, under_way: bool = True) -> Table:
    """One line for the whole run: steps, a bar of the work done, and during the run elapsed and remaining time."""
    line = Table.grid(padding=(0, 1))
    head = Text(f"{moment.done} of {moment.total} steps done", style="bold")
    time_of = [Text(clock(moment))] if under_way else []
    line.add_row(head, ProgressBar(total=1.0, completed=moment.share, width=BAR), *time_of)
    return line


def clock(moment: Moment) -> str:
    """Elapsed and remaining time as text."""
    gone = duration(moment.elapsed)
    if moment.done == moment.total:
        return gone
    left = (
        "time left not known yet" if moment.remaining is None else f"about {duration(moment.remaining)} left"
    )
    return f"{gone}, {left}"


def troubles_of(counts: Mapping[str, int]) -> list[Text]:
    """The number of retries and lost workers as a line, if there are any."""
    said = [
        f"{count} {TROUBLES[kind][count != 1]}"
        for kind, count in counts.items()
        if count and kind in TROUBLES
    ]
    return [Text("so far: " + ", ".join(said), style=WARNING)] if said else []


def worked(progress: Said, whole: float | None) -> float:
    """Seconds of work that a running step has done, by its share of a step that takes `whole`; 0 without a progress file."""
    return whole * int(progress["step"]) / int(progress["steps"]) if whole and progress.get("steps") else 0.0


def running_table(running: Iterable[Running]) -> Table:
    """Running steps: (label, progress file of its worker, seconds since it began) each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("running", "steps", "rate", "left", "loss"):
        table.add_column(column, justify="left" if column == "running" else "right")
    for label, progress, seconds in running:
        steps, rate, left, loss = training_columns(progress)
        table.add_row(Text(label), steps or duration(seconds), rate, left, loss)
    return table


def standings_table(rows: Iterable[Row], hidden: int, splits: Sequence[str] = ()) -> Table:
    """A table of `Standings.rows`, the number of trajectories left out, and the scored splits."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("trajectory", "t", "GM on val" if tuple(splits) == (VAL,) else "GM"):
        table.add_column(column, justify="left" if column == "trajectory" else "right")
    for name, t, tasks, score in rows:
        table.add_row(Text(name), f"{t}/{tasks}", "" if score is None else f"{score:.3f}")
    if hidden:
        table.add_row(f"and {hidden} more", "", "", style="dim")
    return table


def read_progress(scratch: Path, fingerprint: str) -> TrainingProgress:
    """The progress file of a step's worker; empty if there is none."""
    try:
        answer = json.loads((scratch / fingerprint / "progress.json").read_text())
    except (OSError, ValueError):
        return {}
    return cast(TrainingProgress, answer) if isinstance(answer, dict) else {}


def training_columns(progress: Said) -> tuple[str, str, str, str]:
    """Steps done, samples per second, time left and loss of an expert in training, as text. The rate excludes the start of
    workers.
    """
    if not progress.get("steps"):
        return ("", "", "", "")
    step, steps, rate = int(progress["step"]), int(progress["steps"]), float(progress.get("rate") or 0)
    samples, loss = float(progress.get("samples") or 0), progress.get("loss")
    left = duration((steps - step) * samples / step / rate) if step and samples and rate else ""
    return (
        f"{step}/{steps}",
        f"{rate:.0f} samples/s" if rate else "",
        left,
        f"{loss:.3f}" if loss is not None else "",
    )


def outlook(summary: Summary) -> str:
    """The steps ahead, and the savings by sharing, in one line."""
    kinds = [
        f"{counts['unique']} {kind} ({counts['naive']} one by one, {counts['cached']} in store)"
        for kind, counts in summary["steps"].items()
    ]
    return f"{summary['study']}: {summary['trajectories']} trajectories; steps: {', '.join(kinds)}"
