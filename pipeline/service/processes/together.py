"""A service in its home: on one machine, serving processes and the working process around one socket, without Ray; or on a Ray cluster.

Invariant: the same call on the same directory goes on where it ended, with the weights that the log says are served. A call that is
refused, also because another one serves the directory or something else has the port, leaves the service as it is.
"""

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
    with serving(out, config, ENDING_SECONDS):
        if config.resources.home == "ray":
            from pipeline.service.processes.on_ray import serve as on_ray

            on_ray(out, config, lambda: opened(out, config))
        else:
            with listening(config.listen) as sock:
                run(sock, opened(out, config), workers(out, config))


def opened(out: Path, config: ServiceConfig) -> Setup:
    """What processes that answer need, of the service in OUT, which is begun if there is none yet. Raises UserError."""
    home = Home.open(out, config)
    Statement(home).write()
    return Setup(
        name=config.name,
        home=home.base.path.absolute(),
        head=(home.place / HEAD).absolute(),
        state=(home.place / DOOR).absolute(),
        out=out.absolute(),
        serving=config.serving,
        listen=config.listen,
    )


def workers(out: Path, config: ServiceConfig) -> list[Child]:
    """The working process, and the one that delivers to MLflow if the configuration names a tracker."""

    def command(name: str) -> tuple[str, ...]:
        return (sys.executable, "-m", f"pipeline.service.processes.{name}", str(out.absolute()))

    threads = {"OMP_NUM_THREADS": str(config.resources.threads)}
    found = [Child("service", command("service_worker"), threads, nice=5)]
    if config.tracking.uri is not None:
        found.append(Child("registry", command("registry_worker"), {"OMP_NUM_THREADS": "1"}, nice=10))
    return found
