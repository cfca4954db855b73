"""Servers that tests start on loopback, and end."""

import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

PATIENCE_SECONDS = 90


@contextmanager
def serving(
    command: Callable[[int], Sequence[str]], home: Path, environment: Mapping[str, str] | None = None
) -> Iterator[int]:
    """Run `command(port)` until it answers on /health; gives the port. Its output is in home/server.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = home / "server.log"
    with log.open("w") as sink:
        process = subprocess.Popen(command(port), stdout=sink, stderr=sink, env=environment, cwd=home)
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, log)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"the server did not start: {log.read_text()[-2000:]}")
