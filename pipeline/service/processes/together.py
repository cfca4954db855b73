"""A service on one machine: serving processes and the working process around one socket, without Ray.

Invariant: the same call on the same directory goes on where it ended, with the weights that the log says are served. A call that is
refused, also because another one serves the directory or something else has the port, leaves the service as it is.
"""

import socket
import sys
from pathlib import Path

from pipeline.service.config import ServiceConfig
from pipeline.service.home import Home, serving
from pipeline.service.processes.service_worker import HEAD, Statement
from pipeline.service.processes.supervisor import ENDING_SECONDS, Child, listening, run
from pipeline.service.settings import Setup

DOOR = "door"
"""The folder of tokens, label sets and metrics in a service's place."""


def serve(out: Path, config: ServiceConfig) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises UserError, OSError."""
    with serving(out, config, ENDING_SECONDS), listening(config.listen) as sock:
        _serve(sock, Home.open(out, config))


def _serve(sock: socket.socket, home: Home) -> None:
    out, config = home.out, home.config
    Statement(home).write()
    setup = Setup(
        name=config.name,
        home=home.base.path.absolute(),
        head=(home.place / HEAD).absolute(),
        state=(home.place / DOOR).absolute(),
        out=out.absolute(),
        serving=config.serving,
        listen=config.listen,
    )
    run(sock, setup, workers(out, config))


def workers(out: Path, config: ServiceConfig) -> list[Child]:
    """The working process, and the one that delivers to MLflow if the configuration names a tracker."""

    def command(name: str) -> tuple[str, ...]:
        return (sys.executable, "-m", f"pipeline.service.processes.{name}", str(out.absolute()))

    threads = {"OMP_NUM_THREADS": str(config.resources.threads)}
    found = [Child("service", command("service_worker"), threads, nice=5)]
    if config.tracking.uri is not None:
        found.append(Child("registry", command("registry_worker"), {"OMP_NUM_THREADS": "1"}, nice=10))
    return found
