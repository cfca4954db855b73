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
from contextlib import contextmanager
from pathlib import Path

PATIENCE_SECONDS = 240


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
    """A port on which no process listens at present."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"the server did not start: {log.read_text()[-2000:]}")
