"""One serving process: `python -m pipeline.service.processes.serving_worker SETUP.json DESCRIPTOR`, started by the supervisor.

It accepts connections on a listening socket that it inherited, and that the supervisor keeps open: while a process is restarted,
connections wait in the socket's queue.
Invariant: it accepts its first connection when a model is loaded, if there is one that can be, and ends on SIGTERM, Ctrl-C, or when its
supervisor is gone, after the requests that it has accepted are answered.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path

import uvicorn

from pipeline.service.app import create_app
from pipeline.service.http.protocol import bounded
from pipeline.service.metrics import place
from pipeline.service.processes.child import when_orphaned
from pipeline.service.settings import Setup
from workers.serving.serving import use_threads

KEEP_ALIVE_SECONDS = 30
MOST_HEADER_BYTES = 32 << 10


class _Inherited(socket.socket):
    """A socket that listens already. asyncio would set the length of its queue anew, for all who share it."""

    def listen(self, backlog: int = 0, /) -> None:
        """Nothing is to be done."""


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ending: threading.Event) -> None:
        super().__init__(config)
        self._ending = ending

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would raise the signal again in the end, and the exit code would say that the process was killed."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._finish)
        when_orphaned(lambda: loop.call_soon_threadsafe(self._finish))
        yield

    def _finish(self) -> None:
        self._ending.set()
        self.force_exit = self.should_exit
        self.should_exit = True


def prepare(setup: Setup) -> None:
    """What any process that answers does first, whoever starts it: who is not let in goes to a file that is bounded, and the model has its
    threads."""
    refused = RotatingFileHandler(setup.state / f"refused-{place()}.log", maxBytes=1 << 20, backupCount=2)
    refused.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger("temporal_merge.refused").addHandler(refused)
    logging.getLogger("temporal_merge.refused").propagate = False
    use_threads(setup.serving.threads)


def serve(setup: Setup, descriptor: int) -> None:
    """Serve until it is ended."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    prepare(setup)
    limits, tls, ending = setup.limits, setup.listen.tls, threading.Event()
    config = uvicorn.Config(
        create_app(setup, ending=ending),
        http=bounded(limits.connections, limits.header_s, KEEP_ALIVE_SECONDS),
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=1,  # connections that are accepted at a time, so that processes share them evenly
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(limits.answer_s) + 1,
        h11_max_incomplete_event_size=MOST_HEADER_BYTES,
        ssl_certfile=tls.certificate if tls else None,
        ssl_keyfile=tls.key if tls else None,
    )
    asyncio.run(_Server(config, ending).serve(sockets=[_Inherited(fileno=descriptor)]))


if __name__ == "__main__":
    serve(Setup.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8")), int(sys.argv[2]))
