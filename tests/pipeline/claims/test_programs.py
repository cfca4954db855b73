"""The programs of the studies of claims end with their caller, in order, and one that fails says what to do."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from merge_service.errors import UserError
from pipeline.claims.programs import Program, run_programs
from tests.world import ROOT

CALLED = """
import signal, sys, time
from pathlib import Path

def interrupt(*_):
    raise KeyboardInterrupt

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, interrupt)
mine = Path(sys.argv[1])
mine.with_suffix(".begun").touch()
try:
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.6)
    mine.with_suffix(".ended").touch()
    sys.exit(3)
"""
CALLER = """
import sys
from pipeline.claims.programs import Program, exit_code, run_as_program, run_programs

programs = [Program(name, ("-c", sys.argv[1], name)) for name in sys.argv[2:]]
sys.exit(run_as_program(lambda: exit_code(lambda: run_programs(*programs) or ["all done"])))
"""


def test_program_that_fails_is_named_with_what_to_do() -> None:
    with pytest.raises(UserError, match="it ended with exit code 3; give the same command again"):
        run_programs(Program("it", ("-c", "raise SystemExit(3)")))


def test_program_beside_one_that_fails_ends_before_the_caller_goes_on(tmp_path: Path) -> None:
    other = Program("other", ("-c", CALLED, str(tmp_path / "other")))
    fails = "import time, pathlib\nwhile not pathlib.Path(%r).exists(): time.sleep(0.05)\nraise SystemExit(4)"
    with pytest.raises(UserError, match="first ended with exit code 4"):
        run_programs(Program("first", ("-c", fails % str(tmp_path / "other.begun"))), other)
    assert (tmp_path / "other.ended").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_to_the_caller_alone_ends_its_programs_in_order(
    tmp_path: Path, number: signal.Signals
) -> None:
    called = [tmp_path / "one", tmp_path / "two"]
    line = [sys.executable, "-c", CALLER, CALLED, *map(str, called)]
    caller = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not all(one.with_suffix(".begun").exists() for one in called):
        assert caller.poll() is None and time.monotonic() < deadline, caller.stderr
        time.sleep(0.05)
    caller.send_signal(number)
    out, err = caller.communicate(timeout=60)
    assert all(one.with_suffix(".ended").exists() for one in called)
    assert caller.returncode == 128 + number and out == ""
    assert f"ended: by {number.name}" in err and "same command again" in err and "Traceback" not in err
