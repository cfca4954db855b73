"""Servers that tests start on loopback, and end."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import cycle, islice
from pathlib import Path

PATIENCE_SECONDS = 240

PORTS, BLOCK = range(20_000, 32_000), 64
"""The ports of servers of tests, above those of Ray's workers (10,002 to 19,999), and how many a process has for itself."""


@contextmanager
def serving(
    command: Callable[[int], Sequence[str]],
    home: Path,
    environment: Mapping[str, str] | None = None,
    port: int | None = None,
) -> Iterator[int]:
    """Run `command(port)` until it answers on /health; gives the port, by default a free one. Its output is in
    home/server.log. At the end it is killed, with all that it started."""
    port = port or free_port()
    log = home / "server.log"
    with log.open("a") as sink:
        process = subprocess.Popen(
            command(port), stdout=sink, stderr=sink, env=environment, cwd=home, start_new_session=True
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, log)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


@contextmanager
def mlflow_at(port: int | None, home: Path) -> Iterator[str]:
    """MLflow's own server, on this port or a free one, with its database in `home`: its address. The same port and home are the same server again."""

    def command(port: int) -> list[str]:
        return [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)),
            *("--backend-store-uri", f"sqlite:///{home}/server.db", "--artifacts-destination", str(home / "artifacts")),
        ]  # fmt: skip

    with serving(command, home, port=port) as found:
        yield f"http://127.0.0.1:{found}"


def free_port() -> int:
    """A port on which no process listens, and which no other process takes before its server does: it is of this process's
    own block, below the ports that the system gives to whoever names none.
    """
    _, ports = _block_of_this_process()
    for port in islice(ports, BLOCK):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError("servers that tests of this process left hold every port of its block")


@cache
def _block_of_this_process() -> tuple[socket.socket, Iterator[int]]:
    """The socket that holds the block, because it is bound to the block's first port; and the other ports, round and round."""
    for first in range(PORTS.start, PORTS.stop, BLOCK):
        guard = socket.socket()
        try:
            guard.bind(("", first))
        except OSError:
            guard.close()
        else:
            return guard, cycle(range(first + 1, first + BLOCK))
    raise AssertionError(f"other processes hold every block of ports from {PORTS.start} to {PORTS.stop}")


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"the server did not start: {log.read_text()[-2000:]}")
