"""How a command ends on a signal: in order, with exit code 128 + the number of the signal, and a message.

Invariant: every signal becomes a KeyboardInterrupt in the main thread, the one exception that all libraries pass on unchanged
(Ray turns a SystemExit into another one). The first signal decides the exit code.
"""

import contextlib
import signal
from typing import Any

SIGINT = signal.SIGINT
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_received: list[signal.Signals] = []


def watch() -> None:
    """Handle the signals from now on, except those that the parent process has set to be ignored (as nohup does)."""
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, _: Any) -> None:
    _received.append(signal.Signals(number))
    raise KeyboardInterrupt


def received() -> signal.Signals | None:
    """The first signal that was received, else None."""
    return _received[0] if _received else None


def tell(code: int) -> int:
    """Report the signal that ended the command, if there was one; returns its exit code, else `code`."""
    number = received()
    if number is None or code == 0:
        return code
    from pipeline.console import complain

    with contextlib.suppress(OSError):  # the terminal may be gone
        complain(
            "ended", f"by {number.name}; what was finished is kept, give the same command again to go on"
        )
    return 128 + number
