"""The programs of the studies of claims: what they call as programs of their own, and how they end themselves.

Invariant: no called program outlives its caller, except one that is killed. On Ctrl-C, SIGTERM or SIGHUP the called programs end in
order, so a run says what it has finished, and the caller ends after them.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_service.errors import UserError
from pipeline import signals


@dataclass(frozen=True)
class Program:
    """Python with these arguments (`words`); `name` is what messages call it."""

    name: str
    words: tuple[str, ...]


def study_program(name: str, study: Path, out: Path, settings: Sequence[str] = ()) -> Program:
    """The run of a study by the command line."""
    return Program(name, ("-m", "pipeline.cli", *study_words(study, out, settings)))


def study_words(study: Path, out: Path, settings: Sequence[str] = ()) -> list[str]:
    """The run of a study as arguments of the command line."""
    return ["run", str(study), "--out", str(out), *(word for one in settings for word in ("--set", one))]


def run_programs(*programs: Program) -> None:
    """Run these programs at the same time; their progress is shown, and their answers are not. Raises UserError if one fails."""
    began = time.monotonic()
    running: list[subprocess.Popen[bytes]] = []
    try:
        for program in programs:
            print(f"{program.name}: begins", file=sys.stderr, flush=True)
            # A group of its own: Ctrl-C in a terminal reaches the caller alone, which hands it on.
            running.append(subprocess.Popen([sys.executable, *program.words], stdout=subprocess.DEVNULL, process_group=0))  # fmt: skip
        for program, process in zip(programs, running, strict=True):
            if code := process.wait():
                raise UserError(
                    f"{program.name} ended with exit code {code}; give the same command again to go on"
                )
            print(f"{program.name}: done in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    finally:
        _end(running)


def _end(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """End those that still run, and wait for them; a second Ctrl-C kills them."""
    left = [process for process in running if process.poll() is None]
    try:
        for process in left:
            process.send_signal(signals.received() or signal.SIGTERM)
        for process in left:
            process.wait()
    except KeyboardInterrupt:
        for process in left:
            process.kill()
        raise


def commit(*outputs: Path) -> str:
    """The commit of the code, with a suffix if code or studies have changed since; `outputs` are files among them that do not count."""
    head = _git("rev-parse", "--short=12", "HEAD")
    apart = [f":!{one}" for one in outputs]
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "configs", *apart)
    return f"{head or 'unknown'}{'-dirty' if changed else ''}"


def _git(*line: str) -> str:
    return subprocess.run(["git", *line], capture_output=True, text=True, check=False).stdout.strip()


def exit_code(act: Callable[[], Sequence[str]]) -> int:
    """Print the lines of `act`, or its UserError; returns the exit code."""
    try:
        print("\n".join(act()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run_as_program(main: Callable[[], int]) -> int:
    """The exit code of a whole program: that of `main`, or 128 + the signal that ended it."""
    signals.watch()
    try:
        return signals.report(main())
    except KeyboardInterrupt:
        return signals.report(128 + signals.SIGINT)
