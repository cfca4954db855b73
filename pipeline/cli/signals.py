"""How a command ends that is asked to end: in order, with 128 and the number of the signal as its exit code, and a word why.

Invariant: every signal becomes a KeyboardInterrupt in the main thread, the one exception that all libraries pass on as it is
(Ray turns a SystemExit into another one). The first signal decides the exit code.
"""

import contextlib
import signal
from typing import Any

SIGINT = signal.SIGINT
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_received: list[signal.Signals] = []


def watch() -> None:
    """Heed the signals from now on, except those that whoever started this process has set to be ignored (as nohup does)."""
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, _: Any) -> None:
    _received.append(signal.Signals(number))
    raise KeyboardInterrupt


def received() -> signal.Signals | None:
    """The first signal that asked this process to end."""
    return _received[0] if _received else None


def tell(code: int) -> int:
    """Say which signal ended the command, if one did and if anybody still reads that: the exit code then; else `code`."""
    number = received()
    if number is None or code == 0:
        return code
    from pipeline.console import complain

    with contextlib.suppress(OSError):  # the terminal may be what has gone
        complain(
            "ended", f"by {number.name}; what was finished is kept, give the same command again to go on"
        )
    return 128 + number
