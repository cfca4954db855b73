"""Numbers of the serving processes for Prometheus, added up over the processes of one start.

Each process writes files of its own in a common folder, named by its place and not by its process id, so a worker that was restarted
goes on counting where it was, and there are never more files than places.
Invariant: no label has values that a client can choose.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values
from prometheus_client.multiprocess import MultiProcessCollector

FOLDER, PLACE = "PROMETHEUS_MULTIPROC_DIR", "TEMPORAL_MERGE_PLACE"
"""Variables of the environment: the common folder, and which of the processes this is."""
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
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


def begin(folder: Path) -> None:
    """An empty common folder, for the processes that will be started; counters begin at zero."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
