"""What a process that a supervisor started knows about it: whether it is still there.

A supervisor holds the other end of a pipe. When it ends, however that happens, the pipe closes, and its children end as on SIGTERM, so
that none of them keeps the port from the supervisor that is started next.
Invariant: without a supervisor nothing here has an effect.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from merge_service.errors import UserError
from pipeline.console import complain

PIPE = "TEMPORAL_MERGE_SUPERVISOR"
"""Variable of the environment: the descriptor of the pipe."""


def when_orphaned(then: Callable[[], object]) -> None:
    """Call `then`, in a thread, when the supervisor has ended."""
    if PIPE in os.environ:
        pipe = int(os.environ[PIPE])
        threading.Thread(target=lambda: (os.read(pipe, 1), then()), name="orphaned", daemon=True).start()


def until_ended(work: Callable[[Path, threading.Event], None]) -> None:
    """Do the work of a process on the directory that its command line names. The event is set by SIGTERM or Ctrl-C, and when the
    supervisor has ended. A UserError is printed, and ends the process with exit code 2."""
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    when_orphaned(ending.set)
    try:
        work(Path(sys.argv[1]), ending)
    except UserError as error:
        complain("error", str(error))
        sys.exit(2)
