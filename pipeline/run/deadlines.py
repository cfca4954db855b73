"""When each running step last showed that it lives, and which has been silent for too long.

A training step reports its progress; a merge or an evaluation shows only that it has ended. Invariant: no step is waited
for longer than its `timeout`; no result depends on when it was given up, since the next try makes the same bytes.
"""

import time
from collections.abc import Callable
from pathlib import Path

from pipeline.plan.steps import Step
from pipeline.run.carriers import CARRIERS
from pipeline.study.config import Study


class Deadlines:
    """Watches the steps of one study; `scratch` is where experts report."""

    def __init__(self, study: Study, scratch: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._study, self._scratch, self._clock = study, scratch, clock
        self._alive: dict[str, tuple[float, int]] = {}

    def start(self, step: Step) -> None:
        """A step begins, or what has passed of it was the start-up of its workers."""
        self._alive[step.fingerprint] = (self._clock(), self._sign(step))

    def limit(self, step: Step) -> float:
        """Seconds that a step may be silent for."""
        return CARRIERS[step.kind].timeout(step, self._study.resources)

    def overdue(self, step: Step) -> bool:
        """Whether a step has been silent for longer than it may."""
        since, sign = self._alive[step.fingerprint]
        if self._sign(step) != sign:
            self.start(step)
            return False
        return self._clock() - since > self.limit(step)

    def _sign(self, step: Step) -> int:
        """Changes with every report. Only a change counts: clocks of other machines may be wrong."""
        try:
            return (self._scratch / step.fingerprint / "progress.json").stat().st_mtime_ns
        except OSError:
            return 0
