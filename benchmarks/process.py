"""One contender's run: a process of its own, its wall and CPU time, and the most memory it held that no file backs.

Invariant: a measured run never shares an interpreter with the benchmark or with another run. So no import, allocator cache or
compiled kernel of one run is there for the next.
"""

import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

POLL = 0.02  # seconds between two looks at the memory of the process
MIB = 1 << 20


@dataclass
class Run:
    """Seconds and bytes of one process. `answer` is the JSON object that it printed last, `failure` says why it failed.

    `peak` is the largest sum of RssAnon and RssShmem seen every 20 ms: heap, stacks, private copies and shared memory,
    but not the pages of mapped checkpoints, which the system may drop whenever it likes.
    """

    wall: float
    cpu: float
    peak: int
    answer: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Everything, for the results file."""
        return asdict(self)


def measure(
    command: Sequence[Any],
    threads: int,
    timeout: float,
    environment: Mapping[str, str] | None = None,
    expect_json: bool = True,
    memory: int | None = None,
) -> Run:
    """Run `command` to its end, or to `timeout` seconds, or until it has `memory` bytes or 95 % of those that are free."""
    allowed = int(0.95 * available_memory())
    allowed = min(allowed, memory) if memory else allowed
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], stdout=out, stderr=err, env=_environment(threads, environment)
        )
        watch = _Watch(process, allowed, began + timeout)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        finally:
            watch.stop()
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        run = Run(wall, usage.ru_utime + usage.ru_stime, watch.peak, failure=watch.reason)
        if process.returncode and not run.failure:
            run.failure = f"exit {process.returncode}: {_last_line(err) or _last_line(out)}"
        elif not run.failure and expect_json:
            run.answer = json.loads(_last_line(out))
        return run


class _Watch(threading.Thread):
    """Looks at a process's memory, and ends it when it takes too much or too long."""

    def __init__(self, process: subprocess.Popen, allowed: int, deadline: float) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.reason: str | None = None
        self._process, self._allowed, self._deadline = process, allowed, deadline
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._over.wait(POLL):
            self.peak = max(self.peak, anonymous_memory(self._process.pid))
            if self.peak > self._allowed:
                self._end(f"took more than the {self._allowed / MIB:.0f} MiB that it might")
            elif time.perf_counter() > self._deadline:
                self._end("took longer than --timeout")

    def stop(self) -> None:
        self._over.set()
        self.join()

    def _end(self, reason: str) -> None:
        self.reason = reason
        self._over.set()
        self._process.kill()


def anonymous_memory(pid: int) -> int:
    """Bytes of RssAnon + RssShmem of a process, 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def available_memory() -> int:
    """Bytes that a process could take now without the system swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def clear(directory: Path) -> Path:
    """An empty `directory`: the output of the last run is gone, also from the system's write queue."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def _environment(threads: int, more: Mapping[str, str] | None) -> dict[str, str]:
    """As users have it: Python keeps its bytecode, nothing is fetched."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, **limits, **offline, **(more or {})}


def _last_line(file: Any) -> str:
    file.seek(0)
    lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""
