"""The working process of a service: `python -m pipeline.service.processes.service_worker OUT`, started by the supervisor.

It does what the log asks for, step by step, and states in the head what serving processes serve. Serving goes on while it works, and
when it is restarted.
Invariant: the head states only what the log says is served, and only while its file is in the store.
"""

import contextlib
import threading
import time
from pathlib import Path

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.live import State, Version
from pipeline.service.home import Busy, Home
from pipeline.service.intake.uploads import FOLDER, Room, Uploads
from pipeline.service.processes.child import until_ended
from pipeline.service.worker import Worker, trial_key
from workers.serving.served import HeadFile, Served, Trial

HEAD = "head.json"
POLL_SECONDS = 0.2
SWEEP_SECONDS = 600.0
"""Between two looks for abandoned uploads."""


class Statement:
    """The head of a service, written where it differs from what was written last."""

    def __init__(self, home: Home) -> None:
        self._home, self._file = home, HeadFile(home.place / HEAD)
        self._last: object = None

    def write(self) -> None:
        """State what the log says now. A version whose file is not made yet leaves the last statement in force. Raises OSError."""
        state = self._home.log.state
        trial = self._trial(state)
        if (known := (state.served, state.chain, trial)) == self._last:
            return
        current = self._of(state, state.served.version)
        if current is None:
            return
        newest = range(max(0, state.t - self._home.config.serving.keep_warm) + 1, state.t + 1)
        kept = [self._of(state, state.version(t)) for t in newest]
        self._file.write(current, [one for one in kept if one is not None], trial)
        self._last = known

    def _trial(self, state: State) -> Trial | None:
        """The candidate that is tried on real requests now."""
        one = state.challenger
        if one is None or one.status != "canary" or one.trial is None or one.candidate is None:
            return None
        record = self._home.store.find(one.candidate.fingerprint)
        if record is None:
            return None
        file = (record.path / WEIGHTS_FILE).absolute()
        served = Served(one.candidate.t, one.id, one.candidate.sha256, file, one.tried or 0)
        return Trial(served, one.trial.share, one.trial.shadow, trial_key(one))

    def _of(self, state: State, version: Version) -> Served | None:
        record = self._home.store.find(version.fingerprint) if version.fingerprint else None
        if record is None or not (record.path / WEIGHTS_FILE).is_file():
            return None
        arrival = state.sequence[version.t - 1].arrival if version.t else ""
        file = (record.path / WEIGHTS_FILE).absolute()
        return Served(version.t, arrival, version.sha256, file, version.t)


def work(out: Path, ending: threading.Event) -> None:
    """Work until `ending` is set. While another process works for this service, only its results are stated. Raises what the work
    raises."""
    home = Home.open(out)
    statement = Statement(home)
    uploads, swept = Uploads(home.place / FOLDER, Room.of(home)), 0.0
    with contextlib.ExitStack() as held:
        worker: Worker | None = None
        while not ending.is_set():
            worker = worker or _begun(home, held)
            busy = worker is not None and worker.step()
            home.log.refresh()
            statement.write()
            if time.monotonic() > swept:
                uploads.sweep()
                swept = time.monotonic() + SWEEP_SECONDS
            if not busy:
                ending.wait(POLL_SECONDS)


def _begun(home: Home, held: contextlib.ExitStack) -> Worker | None:
    """What does the work, until `held` ends; None while another process does it."""
    try:
        held.enter_context(home.working())
    except Busy:
        return None
    return home.worker()


if __name__ == "__main__":
    until_ended(work)
