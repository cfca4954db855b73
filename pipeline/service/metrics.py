"""Numbers of the serving processes for Prometheus, added up over the processes of one start.

Each process writes files of its own in a common folder, named by its place and not by its process id, so a worker that was restarted
goes on counting where it was, and there are never more files than places. Files are mapped into memory, and a page that has no block on
a full disk ends the process that writes it (SIGBUS). So all blocks are taken before a process starts.
Invariant: no label has values that a client can choose, so files never outgrow the blocks that they begin with.
"""

import fcntl
import itertools
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values
from prometheus_client.multiprocess import MultiProcessCollector

from pipeline.files.disk import room_for

FOLDER, PLACE = "PROMETHEUS_MULTIPROC_DIR", "TEMPORAL_MERGE_PLACE"
"""Variables of the environment: the common folder, and which of the processes this is."""
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_BYTES = {"counter": 1 << 19, "histogram": 1 << 19, "gauge_sum": 1 << 16, "gauge_mostrecent": 1 << 16}
"""Bytes of each file of a place, by the prefix of its name; the library takes a file that is there as it is."""
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one process."""

    def __init__(self) -> None:
        together = FOLDER in os.environ
        if together:
            values.ValueClass = values.MultiProcessValue(place)
        self._registry = CollectorRegistry()
        mine: dict[str, Any] = {"registry": self._registry}
        self.requests = Counter(
            "tm_requests", "Requests that were answered", ["route", "status", "role"], **mine
        )
        self.seconds = Histogram(
            "tm_request_seconds", "Seconds of a request", ["route"], buckets=_SECONDS, **mine
        )
        self.auth_failures = Counter("tm_auth_failures", "Requests without a valid token", ["code"], **mine)
        self.batch_size = Histogram("tm_batch_size", "Pictures and texts of a batch", buckets=_SIZES, **mine)
        self.queue = Gauge("tm_queue", "Pictures and texts that wait", multiprocess_mode="sum", **mine)
        self.served_t = Gauge(
            "tm_served_t", "Time step that is served", multiprocess_mode="mostrecent", **mine
        )
        self.swaps = Histogram(
            "tm_swap_seconds",
            "Seconds from new weights to their first answer",
            ["outcome"],
            buckets=_SECONDS,
            **mine,
        )
        self.restarts = Counter(
            "tm_worker_restarts", "Processes that ended and were started again", ["child"], **mine
        )

    def text(self) -> bytes:
        """All metrics of all processes, in Prometheus's format."""
        if FOLDER not in os.environ:
            return prometheus_client.generate_latest(self._registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)
        return prometheus_client.generate_latest(together)


def place() -> str:
    """Which of the processes this is."""
    return os.environ.get(PLACE, "0")


def take_place(folder: Path) -> None:
    """Be, until this process ends, the first of the places that no other process is: where nobody numbers processes. Raises OSError."""
    for number in itertools.count():
        handle = os.open(folder / f"{number}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
        else:
            os.environ |= {FOLDER: str(folder), PLACE: str(number)}
            return


def begin(folder: Path, places: Iterable[str]) -> None:
    """A common folder for the processes that will be started at these places; counters begin at zero. Raises StorageFull, OSError."""
    shutil.rmtree(folder, ignore_errors=True)
    with room_for(folder.name, folder.parent):
        folder.mkdir(parents=True)
        for one in places:
            for kind, size in _BYTES.items():
                with (folder / f"{kind}_{one}.db").open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, size)
