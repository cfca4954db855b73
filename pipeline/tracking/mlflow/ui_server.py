"""The MLflow server of `temporal-merge ui`: started, announced once it answers, and ended with the command.

Invariant: the announced address is that of this server. The port is free before it starts, and its answer contains a secret word,
so another program on the port is never shown as a run's tracking store.
"""

import contextlib
import errno
import os
import secrets
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Sequence

from merge_service.errors import UserError
from pipeline.errors import TrackingError
from pipeline.tracking.mlflow.ui import WORD, WORD_HEADER

HOST = "127.0.0.1"
START_SECONDS, END_SECONDS = 180.0, 10.0
_LOOK_SECONDS = 0.2


class PortTaken(UserError):
    """Another program listens on the port, or this user may not listen there."""


def check_port(port: int) -> None:
    """Raise PortTaken unless this process may listen on the port of loopback."""
    try:
        _listen(port)
    except OSError as error:
        free = next((one for one in range(port + 1, min(port + 100, 65536)) if _is_free(one)), None)
        hint = f"--port {free} is free" if free else "give another --port"
        what = "another program listens there" if error.errno == errno.EADDRINUSE else error.strerror
        raise PortTaken(f"--port {port}: the UI cannot listen on {HOST}:{port} ({what}); {hint}") from None


def serve(command: Sequence[str], url: str, ready: Callable[[], None]) -> int:
    """Run the server until it or this process ends; returns its exit code. `ready` is called once `url` answers.

    Raises TrackingError if the server ends, or START_SECONDS pass, before that.
    """
    word = secrets.token_hex(16)
    # The server prints to standard error: standard output is for this command's answer.
    process = subprocess.Popen(command, env=os.environ | {WORD: word}, stdout=2, process_group=0)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(url, word):
            if process.poll() is not None:
                raise TrackingError(
                    f"the MLflow server ended with {process.returncode} before it answered; its own output says why"
                )
            if time.monotonic() > deadline:
                raise TrackingError(f"the MLflow server did not answer at {url} within {START_SECONDS:g} s")
            time.sleep(_LOOK_SECONDS)
        ready()
        return process.wait()
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and the processes it has started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)


def _answers(url: str, word: str) -> bool:
    """Whether the server with this word answers; proxies of the environment are not used."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=5) as answer:
            return bool(answer.headers.get(WORD_HEADER) == word)
    except OSError:
        return False


def _is_free(port: int) -> bool:
    with contextlib.suppress(OSError):
        _listen(port)
        return True
    return False


def _listen(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((HOST, port))
        probe.listen()
