"""The speed of steps and the time left of a run: arithmetic over a plan's graph and measured times.

Invariant: only work counts. The time of a step begins when its workers begin with it, so the start of a worker (importing torch,
joining the other ranks) is part of no rate.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.kinds.table import KINDS
from pipeline.plan.steps import Step
from pipeline.run.trace import read_timeline

MERGES = "merge"
Line = Mapping[str, Any]
"""A line of OUT/timeline.jsonl."""


class Pace:
    """Rates of a plan's steps. A train step is measured in its GFLOPs, or in its optimizer steps if these are unknown; other
    steps count as one unit each.

    `width` is the largest number of steps that ran at the same time, by lane: merges have their own workers.
    """

    def __init__(self, steps: Mapping[str, Step]) -> None:
        self._steps = steps
        weighed = all(step.gflops for step in steps.values() if KINDS[step.kind].trains)
        self._units = {name: _units(step, weighed) for name, step in steps.items()}
        self._measured: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.width = {True: 1, False: 1}

    @property
    def total(self) -> int:
        """The number of steps of the plan."""
        return len(self._steps)

    @property
    def measured(self) -> bool:
        """Whether the time of any step is known."""
        return bool(self._measured)

    def took(self, fingerprint: str, seconds: float) -> None:
        """Record the seconds of a step; one of another plan is ignored."""
        step = self._steps.get(fingerprint)
        if step is not None and seconds >= 0:
            for key in ((step.kind, step.model), (step.kind, "")):
                self._measured[key][0] += seconds
                self._measured[key][1] += self._units[fingerprint]

    def at_once(self, kinds: Iterable[str]) -> None:
        """Record the kinds of the steps that are running at present."""
        merges = [kind == MERGES for kind in kinds]
        for lane in self.width:
            self.width[lane] = max(self.width[lane], merges.count(lane))

    def seconds(self, fingerprint: str) -> float | None:
        """How long a step takes, by the rate of its kind and model, else of its kind, else by the rough weight of kinds; None if
        nothing was measured, or the plan has no such step.
        """
        step = self._steps.get(fingerprint)
        if step is None:
            return None
        for key in ((step.kind, step.model), (step.kind, "")):
            spent, units = self._measured.get(key, (0.0, 0.0))
            if units:
                return spent / units * self._units[fingerprint]
        for kind, row in KINDS.items():
            spent, units = self._measured.get((kind, ""), (0.0, 0.0))
            if units and row.weight:
                mine, mean = KINDS[step.kind], self._mean(kind)
                return spent / units * mean * mine.weight / row.weight
        return None

    def left(self, done: Collection[str], running: Mapping[str, float] | None = None) -> float | None:
        """Seconds until every step is done: the longest chain, or all work divided by the number of workers so far, whichever is
        more.

        `running` has the seconds of work of running steps. None while nothing was measured.
        """
        costs = self._ahead(done, running or {})
        if costs is None:
            return None
        shared = [
            sum(cost for name, cost in costs.items() if (self._steps[name].kind == MERGES) is lane)
            / self.width[lane]
            for lane in self.width
        ]
        return max(_longest(self._steps, costs), *shared)

    def chain(self, done: Collection[str]) -> float:
        """Seconds of the longest chain of steps that are not done, which no number of workers shortens. 0 while nothing was
        measured.
        """
        return _longest(self._steps, self._ahead(done, {}) or {})

    def _ahead(self, done: Collection[str], running: Mapping[str, float]) -> dict[str, float] | None:
        """Remaining seconds of each step; None while nothing was measured."""
        costs: dict[str, float] = {}
        for name in self._steps:
            if name not in done:
                whole = self.seconds(name)
                if whole is None:
                    return None
                costs[name] = max(0.0, whole - running.get(name, 0.0))
        return costs

    def share(self, done: Collection[str], running: Mapping[str, float] | None = None) -> float:
        """The part of all work that is done, in [0, 1]; of the number of steps while nothing was measured."""
        if not self._steps:
            return 1.0
        whole = [self.seconds(name) or 0.0 for name in self._steps]
        costs = dict(zip(self._steps, whole if sum(whole) > 0 else [1.0] * len(whole)))
        made = [costs[name] for name in done if name in costs]
        made += [
            min(spent, costs[name])
            for name, spent in (running or {}).items()
            if name in costs and name not in done
        ]
        return min(
            1.0, math.fsum(made) / math.fsum(costs.values())
        )  # exact sums, so that a finished plan gives 1

    def _mean(self, kind: str) -> float:
        units = [self._units[name] for name, step in self._steps.items() if step.kind == kind]
        return sum(units) / len(units) if units else 1.0


def pace_of(steps: Mapping[str, Step], out: Path) -> Pace:
    """The pace of a plan's steps from the timeline of OUT; nothing is measured if OUT has none."""
    pace = Pace(steps)
    with suppress(OSError):
        learn(pace, read_timeline(out))
    return pace


def learn(pace: Pace, timeline: Iterable[Line]) -> None:
    """Read lines of OUT/timeline.jsonl: the durations of steps, and how many ran at the same time."""
    spans = [line for line in timeline if "fingerprint" in line]
    for line in spans:
        pace.took(str(line["fingerprint"]), float(line["end"]) - float(line["start"]))
    for lane, width in pace.width.items():
        mine = [line for line in spans if (line["kind"] == MERGES) is lane]
        turns = sorted([(line["start"], 1) for line in mine] + [(line["end"], -1) for line in mine])
        under_way = most = 0
        for _, change in turns:
            under_way += change
            most = max(most, under_way)
        pace.width[lane] = max(width, most)


def duration(seconds: float) -> str:
    """A time as short text: 40 s, 3 min, 2 h 10 min, 3 days 4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h" if hours else f"{days} days"


def _units(step: Step, weighed: bool) -> float:
    if not KINDS[step.kind].trains:
        return 1.0
    return float(step.gflops or 0.0) if weighed else float(step.spec["steps"])


def _longest(steps: Mapping[str, Step], costs: Mapping[str, float]) -> float:
    """The longest chain of steps that must follow one another, in seconds. Steps come in topological order."""
    ends: dict[str, float] = {}
    for name, cost in costs.items():
        step = steps[name]
        ends[name] = cost + max(
            (ends.get(need, 0.0) for need in (*step.inputs.values(), *step.after)), default=0.0
        )
    return max(ends.values(), default=0.0)
