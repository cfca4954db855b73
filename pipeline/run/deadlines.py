"""Timeouts: the last sign of progress of each running step.

A training step reports its progress; a merge or an evaluation reports only its end.

Invariant: no step runs without progress for longer than its `timeout`. No result depends on when a step was ended, because the
next try makes the same bytes.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from pipeline.plan.steps import Step
from pipeline.run.carriers import CARRIERS
from pipeline.study.config import Study


class Waited(Protocol):
    """A group of workers: when it was created (`time.monotonic`), whether it has a place, and whether it answers."""

    @property
    def since(self) -> float: ...
    @property
    def placed(self) -> bool: ...
    @property
    def up(self) -> bool: ...


def why_waiting(group: Waited, elastic: bool) -> str:
    """Why a new group does not answer yet, as far as known."""
    if group.placed:
        return "is still starting: importing its libraries takes long on its node"
    if elastic:
        return "waits for a place: it is taken, or a node has yet to come (or is slow to start a process)"
    return "has no process yet: its node is slow to start one, or another job of the cluster has the place"


class Deadlines:
    """Watches the steps of one study; `scratch` is the directory where experts report progress."""

    def __init__(self, study: Study, scratch: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._study, self._scratch, self._clock = study, scratch, clock
        self._alive: dict[str, tuple[float, int]] = {}

    def start(self, step: Step) -> None:
        """Start or restart the timeout of a step, at its beginning and while its workers are still starting."""
        self._alive[step.fingerprint] = (self._clock(), self._sign(step))

    def limit(self, step: Step) -> float:
        """How many seconds a step may run without progress."""
        return CARRIERS[step.kind].timeout(step, self._study.resources)

    def overdue(self, step: Step) -> bool:
        """Whether a step has shown no progress for longer than its limit."""
        since, sign = self._alive[step.fingerprint]
        if self._sign(step) != sign:
            self.start(step)
            return False
        return self._clock() - since > self.limit(step)

    def why(self, step: Step, group: Waited, elastic: bool) -> str:
        """Why a step is to be given up: no sign of progress, or its workers did not start; empty while it may continue.

        If nodes come and go by themselves (`elastic`), waiting for a node has no limit.
        """
        if group.up:
            if not self.overdue(step):
                return ""
            return f"its worker showed no sign of progress for {self.limit(step):g} s (resources: timeout)"
        self.start(step)
        limit = self._study.resources.start_timeout
        if self._clock() - group.since <= limit or (elastic and not group.placed):
            return ""
        return f"its worker had not started after {limit:g} s (resources: start_timeout)"

    def _sign(self, step: Step) -> int:
        """A value that changes with every report. Only changes count, because clocks of other machines may be wrong."""
        try:
            return (self._scratch / step.fingerprint / "progress.json").stat().st_mtime_ns
        except OSError:
            return 0
