"""How a command ends on a signal: in order, with exit code 128 + the number of the signal, and a message.

Invariant: every signal becomes a KeyboardInterrupt in the main thread, the one exception that all libraries pass on unchanged
(Ray turns a SystemExit into another one). The first signal decides the exit code; after the message signals are ignored.
"""

import atexit
import contextlib
import os
import signal
import sys
from typing import Any

SIGINT = signal.SIGINT
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_received: list[signal.Signals] = []
_reported: list[signal.Signals] = []


def watch() -> None:
    """Handle the signals from now on, except those that the parent process has set to be ignored (as nohup does)."""
    atexit.register(_leave)
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _leave() -> None:
    """End the process, after every other handler of its exit, where a signal ended the command: destructors of C++ libraries that a
    signal has interrupted abort at times, which would be the exit code."""
    number = received()
    if number is not None and _reported:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(128 + number)


def _interrupt(number: int, _: Any) -> None:
    _received.append(signal.Signals(number))
    raise KeyboardInterrupt


def received() -> signal.Signals | None:
    """The first signal that was received, else None."""
    return _received[0] if _received else None


def report(code: int) -> int:
    """Report the signal that ended the command, if there was one; returns its exit code, else `code`."""
    number = received()
    if number is None or code == 0:
        return code
    for one in ENDING:
        signal.signal(one, signal.SIG_IGN)
    _reported.append(number)
    from pipeline.console import complain

    with contextlib.suppress(OSError):  # the terminal may be gone
        complain(
            "ended", f"by {number.name}; what was finished is kept, give the same command again to go on"
        )
    return 128 + number
