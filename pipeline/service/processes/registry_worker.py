"""The process that delivers a service's versions to MLflow: `python -m pipeline.service.processes.registry_worker OUT`, started by the
supervisor where the configuration names a tracker.

It is a process of its own, so neither merging nor serving waits for MLflow or holds its libraries. Invariant: it only reads the log.
"""

import sys
import threading
from pathlib import Path

from pipeline.errors import TrackingError
from pipeline.service.home import Home
from pipeline.service.processes.child import until_ended
from pipeline.service.registry.delivery import Registry

POLL_SECONDS = 1.0


def deliver(out: Path, ending: threading.Event) -> None:
    """Deliver until `ending` is set. An outbox that cannot be written for now is tried again; raises TrackingError for a broken one."""
    home = Home.open(out)
    registry = Registry(home.place, home.log, home.config)
    registry.tracker.start()
    shown: str | None = None
    while not ending.is_set():
        trouble = registry.tracker.last_error
        try:
            registry.follow()
        except TrackingError as error:
            trouble = str(error)
        if trouble != shown and trouble is not None:
            print(f"registry: {trouble}", file=sys.stderr, flush=True)
        shown = trouble
        ending.wait(POLL_SECONDS)
    registry.close()


if __name__ == "__main__":
    until_ended(deliver)
