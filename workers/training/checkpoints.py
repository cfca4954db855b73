"""What an unfinished expert leaves behind: checkpoints to go on from, and a progress file for whoever watches.

Invariant: a checkpoint counts only when its marker is there, written last, for the same job, and every file in it still
has the sha256 the marker states; otherwise the one before it counts, or none. At most one complete checkpoint is kept.
Whoever began last owns the job: a process that was thought dead, and wakes, finds that out before it changes or hands over anything.
The scratch directory belongs to one job on this run's own storage and is deleted by whoever commits the result.
"""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from merge_service.files import sync_directory
from workers.jobs import TrainJob

MARKER, OWNER = "complete.json", "owner"
PROGRESS = "progress.json"
PROGRESS_BYTES = 200  # no report is longer


class Superseded(Exception):
    """Another process has begun the same job since; this one must end without a trace."""


class LoopState(TypedDict):
    """The numbers of the training loop at a checkpoint: the curve so far and the losses since its last point, [first, highest, last] of
    rates and norms, and the seconds spent. Checkpoints of earlier versions have no norms."""

    curve: list[list[float]]
    losses: list[float]
    rates: list[float]
    norms: NotRequired[list[float]]
    seconds: float


class Checkpoints:
    """The checkpoints of one job below `scratch/checkpoints/`; only rank 0 may change or judge them."""

    def __init__(self, scratch: Path, fingerprint: str) -> None:
        self._root, self._owner = scratch / "checkpoints", scratch / OWNER
        self._fingerprint, self._token = fingerprint, uuid.uuid4().hex

    def claim(self) -> None:
        """Own the job from now on: whoever began it before may no longer write."""
        write_durably(self._owner, self._token)

    def check(self) -> None:
        """Raise Superseded if somebody else has claimed the job, or ended it, since."""
        try:
            token = self._owner.read_text(encoding="utf-8")
        except OSError:  # its result is committed and scratch gone: what is here now is ours, and of no use
            token = "nobody"
            shutil.rmtree(self._root, ignore_errors=True)
        if token != self._token:
            raise Superseded(
                f"{self._owner.parent}: this job was begun anew by another process; nothing is written"
            )

    def staged(self, step: int) -> Path:
        """Where all ranks write the checkpoint after `step` steps, once `stage` has made it."""
        return self._root / f"step-{step:09d}.partial"

    def stage(self, step: int) -> None:
        """Make `staged(step)`, empty. Raises Superseded."""
        self.check()
        shutil.rmtree(self.staged(step), ignore_errors=True)
        self.staged(step).mkdir(parents=True)

    def complete(self, step: int, loop: LoopState) -> None:
        """Make a staged checkpoint count, with the training loop's own numbers, and drop every other one."""
        self.check()
        staged = self.staged(step)
        files = {str(file.relative_to(staged)): _digest(file) for file in _files(staged)}
        marker = {"fingerprint": self._fingerprint, "step": step, "loop": loop, "files": files}
        write_durably(staged / MARKER, json.dumps(marker))
        for directory in (staged, *(path for path in staged.rglob("*") if path.is_dir())):
            sync_directory(directory)
        final = staged.with_suffix("")
        shutil.rmtree(final, ignore_errors=True)
        staged.replace(final)
        sync_directory(self._root)
        for other in self._root.iterdir():
            if other != final:
                shutil.rmtree(other, ignore_errors=True)

    def newest(self) -> int:
        """Steps done at the newest checkpoint that is complete, whole and of this very job; 0 if there is none."""
        candidates = sorted(self._root.glob("step-*[0-9]"), reverse=True) if self._root.is_dir() else []
        markers = (self._intact(directory) for directory in candidates)
        return next((marker["step"] for marker in markers if marker is not None), 0)

    def judged(self, step: int) -> tuple[Path, LoopState]:
        """(directory, the loop's numbers) of the checkpoint that rank 0 found whole."""
        directory = self._root / f"step-{step:09d}"
        loop: LoopState = json.loads((directory / MARKER).read_text())["loop"]
        return directory, loop

    def _intact(self, directory: Path) -> dict[str, Any] | None:
        try:
            marker = json.loads((directory / MARKER).read_text())
            whole = all(_digest(directory / name) == sha for name, sha in marker["files"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return marker if whole and marker["fingerprint"] == self._fingerprint else None


class Due:
    """After which steps a checkpoint is written: every so many steps, or about every so many seconds.

    With seconds, the clock is looked at after 1, 2, 4, ... steps since the last checkpoint and when, by the pace so far, it is time.
    `agree` makes rank 0's number that of all ranks, which look after the same steps.
    """

    def __init__(
        self,
        job: TrainJob,
        start: int,
        agree: Callable[[int], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps, self._seconds = job.checkpoint_every, job.checkpoint_seconds
        self._agree, self._clock = agree, clock
        self._last, self._next, self._then = start, start + 1, clock()

    def __call__(self, step: int) -> bool:
        """Whether one is due after `step` steps; to be asked after every step."""
        if not self._seconds:
            return bool(self._steps) and step % self._steps == 0
        if step < self._next:
            return False
        done, elapsed = step - self._last, self._clock() - self._then
        left = int((self._seconds - elapsed) * done / elapsed) if elapsed > 0 else done
        ahead = self._agree(max(0, min(done, left)))
        self._next = step + max(1, ahead)
        if ahead == 0:
            self._last, self._then = step, self._clock()
        return ahead == 0


class Progress:
    """`progress.json` in scratch: {"step", "steps", "samples", "rate" (samples per second), "loss"}, anew about once a second.

    Written in place, with blanks behind it: a file system may take ten milliseconds to replace a file durably, and whoever
    watches can do with a report that is torn for once.
    """

    def __init__(self, scratch: Path, steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._steps, self._clock = scratch / PROGRESS, steps, clock
        self._written, self._samples_then, self._rate = -float("inf"), 0, 0.0

    def tell(self, step: int, samples: int, loss: float) -> None:
        """Report `step` steps and `samples` samples done; cheap to call after every step."""
        now = self._clock()
        elapsed = now - self._written
        if elapsed < 1 and step < self._steps:
            return
        if elapsed < float("inf") and elapsed > 0:
            self._rate = (samples - self._samples_then) / elapsed
        self._written, self._samples_then = now, samples
        report = {
            "step": step, "steps": self._steps, "samples": samples, "rate": round(self._rate, 1), "loss": loss,
        }  # fmt: skip
        with os.fdopen(os.open(self._file, os.O_WRONLY | os.O_CREAT, 0o644), "w", encoding="utf-8") as file:
            file.write(json.dumps(report).ljust(PROGRESS_BYTES))


def write_durably(file: Path, text: str) -> None:
    """Write a small text file and have it on the disk before returning."""
    with file.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def _files(directory: Path) -> list[Path]:
    return sorted(file for file in directory.rglob("*") if file.is_file())


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        os.fsync(handle.fileno())
    return digest
