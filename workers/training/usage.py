"""Machine usage during the training of an expert: processor, memory and GPU, sampled in the background.

MLflow draws these as system metrics; the names are the ones it uses.
Invariant: sampling never changes or fails a training. There are at most `POINTS` samples: when there are more, every other one
is dropped and the interval doubles.
"""

import contextlib
import threading
import time
from types import TracebackType
from typing import Any, Self

import psutil
import torch

SECONDS, POINTS = 10.0, 100
"""The interval in seconds (as in MLflow's own system metrics) and the limit on the number of samples."""
MEGABYTE = 1e6


class Usage:
    """A context around the steps of a training. `samples` are the values by name; `time_ms` is their time (Unix, milliseconds)."""

    def __init__(self, device: str = "cpu", seconds: float = SECONDS) -> None:
        self.samples: dict[str, list[float]] = {}
        self._device, self._seconds = device, seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
        self._before = psutil.cpu_times()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._sample()

    def _run(self) -> None:
        while not self._over.wait(self._seconds):
            self._sample()

    def _sample(self) -> None:
        with contextlib.suppress(Exception):  # a counter that this machine lacks
            seen = {"time_ms": float(time.time_ns() // 1_000_000), **self._machine(), **self._gpu()}
            if self.samples and seen.keys() != self.samples.keys():
                return  # a counter that is available only sometimes: every name needs a value for every time
            for name, value in seen.items():
                self.samples.setdefault(name, []).append(value)
            if len(self.samples["time_ms"]) > POINTS:
                self.samples = {name: values[1::2] for name, values in self.samples.items()}
                self._seconds *= 2

    def _machine(self) -> dict[str, float]:
        now, before = psutil.cpu_times(), self._before
        self._before = now
        spent, idle = (one - other for one, other in zip(_spent(now), _spent(before), strict=True))
        memory = psutil.virtual_memory()
        return {
            "cpu_utilization_percentage": 100 * (1 - idle / spent) if spent > 0 else 0.0,
            "system_memory_usage_megabytes": (memory.total - memory.available) / MEGABYTE,
            "system_memory_usage_percentage": memory.percent,
            "process_memory_usage_megabytes": psutil.Process().memory_info().rss / MEGABYTE,
        }

    def _gpu(self) -> dict[str, float]:
        if self._device == "cpu":
            return {}
        free, total = torch.cuda.mem_get_info()
        seen = {
            "gpu_0_memory_usage_megabytes": (total - free) / MEGABYTE,
            "gpu_0_memory_usage_percentage": 100 * (1 - free / total),
        }
        with contextlib.suppress(Exception):  # needs pynvml
            seen["gpu_0_utilization_percentage"] = float(torch.cuda.utilization())
        return seen


def _spent(times: Any) -> tuple[float, float]:
    """Seconds of all processors, total and idle. Guest time is subtracted, since user time includes it."""
    of = times._asdict()
    total = sum(of.values()) - of.get("guest", 0.0) - of.get("guest_nice", 0.0)
    return total, of["idle"] + of.get("iowait", 0.0)
