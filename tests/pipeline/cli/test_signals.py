"""How the command ends on a signal: its exit code and message; an ignored signal stays ignored."""

import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.world import ROOT

COMMAND = """
import os, signal, sys, time
from pipeline.cli import app as cli

def work(**_):
    for number in {sent}:
        os.kill(os.getpid(), number)
        try:
            time.sleep(0.05)
        except KeyboardInterrupt:
            if {break_on_the_way}:
                raise OSError("the terminal has gone")
            if number == {sent}[-1]:
                raise
cli.app = work
cli.main()
"""


def end(*sent: int, break_on_the_way: bool = False, **options: Any) -> subprocess.CompletedProcess[str]:
    code = COMMAND.format(sent=[int(number) for number in sent], break_on_the_way=break_on_the_way)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, **options
    )


@pytest.mark.fault("F31")
@pytest.mark.parametrize(
    ("sent", "code", "name"),
    [
        ((signal.SIGTERM,), 143, "SIGTERM"),
        ((signal.SIGINT,), 130, "SIGINT"),
        ((signal.SIGHUP,), 129, "SIGHUP"),
        ((signal.SIGTERM, signal.SIGTERM), 143, "SIGTERM"),
        ((signal.SIGINT, signal.SIGTERM), 130, "SIGINT"),
    ],
)
def test_command_that_a_signal_ends_says_which_and_ends_with_its_code(
    sent: tuple[int, ...], code: int, name: str
) -> None:
    answer = end(*sent)
    assert answer.returncode == code, answer.stderr
    assert f"ended: by {name}" in answer.stderr and "same command again" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.fault("F31")
def test_what_breaks_while_a_command_ends_does_not_hide_the_signal() -> None:
    answer = end(signal.SIGTERM, break_on_the_way=True)
    assert answer.returncode == 143 and "OSError" not in answer.stderr, answer.stderr


@pytest.mark.fault("F31")
def test_signal_that_the_caller_has_ignored_stays_ignored() -> None:
    answer = end(
        signal.SIGHUP, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN), env=dict(os.environ)
    )
    assert answer.returncode == 0, answer.stderr


LEAVING = """
import atexit, ctypes, os, signal, sys
from pipeline.cli import app as cli

def work(**_):
    os.kill(os.getpid(), signal.SIGTERM)

libc = ctypes.CDLL(None)
libc.on_exit(libc.abort, None)  # as the destructor of a library that was interrupted
atexit.register(os.kill, os.getpid(), signal.SIGINT)
cli.app = work
cli.main()
"""


@pytest.mark.fault("F31")
def test_signal_or_abort_of_a_library_at_the_very_end_changes_nothing() -> None:
    answer = subprocess.run([sys.executable, "-c", LEAVING], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 143, answer.stderr
    assert "ended: by SIGTERM" in answer.stderr and "Traceback" not in answer.stderr
