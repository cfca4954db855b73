"""A service on a Ray cluster: the same application in replicas of Ray Serve, the same work in an actor, the same directory.

Every node sees the directory at the same path. Replicas follow the head of the service as processes of one machine do, so new weights are
loaded beside and exchanged by reference; Ray Serve replaces a replica only when it has ended, or for another configuration.
Invariant: when this process is lost, answers and work go on, and the same call finds them again; when it is ended, they end.
"""

import hashlib
import json
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from starlette.types import ASGIApp

from cluster import serve as ray_serve
from cluster.code import check_code, code_digest
from cluster.errors import ClusterError, ClusterLost
from cluster.session import Head, Session, connect
from pipeline.service import metrics
from pipeline.service.config import ServiceConfig
from pipeline.service.processes.supervisor import begun, listening
from pipeline.service.settings import Setup

POLL_SECONDS = 2.0


def serve(out: Path, config: ServiceConfig, opened: Callable[[], Setup]) -> None:
    """Serve until SIGTERM or Ctrl-C; `opened` opens the service once nothing is in its way.

    Raises ClusterError, ConfigError, ClusterLost, and what `opened` raises.
    """
    ending = _ending()
    tls = config.listen.tls
    certificate, key = (str(tls.certificate.absolute()), str(tls.key.absolute())) if tls else (None, None)
    door = ray_serve.Door(config.listen.host.strip("[]"), config.listen.port, certificate, key)
    with connect(config.resources.address, threads=config.resources.threads) as session, Head() as head:
        _check_room(session, config)
        if not ray_serve.check_door(door):
            listening(config.listen).close()
        setup = opened()
        works = list(_works(out.absolute(), config))
        begun(setup)
        application = _application(setup, config)
        running, left = ray_serve.stamp_of(config.name), False
        try:
            if running != application.stamp:
                metrics.begin(setup.metrics, map(str, range(setup.serving.workers)))
                ray_serve.answer(application, door)
            for work in works:
                ray_serve.keep(work)
            print(f"listening on {config.listen.url(config.listen.port)}", flush=True)
            said: dict[str, str | None] = {}
            while not ending.wait(POLL_SECONDS):
                if head.check():
                    _say(config.name, [work.name for work in works], said)
        except (
            ClusterError,
            ClusterLost,
        ) as error:  # what ran before goes on, whatever became of its successor
            left = running is not None or isinstance(error, ClusterLost)
            raise
        finally:
            if not left:
                _end(config.name, works)


def replica(setup: Setup, digest: str) -> ASGIApp:
    """The application in a replica, whose code must be that of the process that started it. Raises CodeMismatch, UserError."""
    check_code(digest, socket.gethostname())
    metrics.take_place(setup.metrics)
    from pipeline.service.app import create_app
    from pipeline.service.processes.serving_worker import prepare

    prepare(setup)
    return create_app(setup)


def worked(out: Path, digest: str, ending: threading.Event) -> None:
    """The work of a service, as on one machine. Raises what the work raises."""
    check_code(digest, socket.gethostname())
    from pipeline.service.processes.service_worker import work

    work(out, ending)


def delivered(out: Path, digest: str, ending: threading.Event) -> None:
    """The delivery to MLflow, as on one machine. Raises what the delivery raises."""
    check_code(digest, socket.gethostname())
    from pipeline.service.processes.registry_worker import deliver

    deliver(out, ending)


def _application(setup: Setup, config: ServiceConfig) -> ray_serve.Application:
    serving, limits, digest = setup.serving, setup.limits, code_digest()
    cpus, gpus = config.resources.cpus, float(serving.device == "cuda")
    made_of = json.dumps([setup.model_dump(mode="json"), cpus, digest])
    return ray_serve.Application(
        name=config.name,
        stamp=hashlib.sha256(made_of.encode()).hexdigest(),
        build=partial(replica, setup, digest),
        replicas=serving.workers,
        cpus=cpus,
        gpus=gpus,
        ongoing=limits.connections,
        grace=limits.answer_s + 5,
    )


def _works(out: Path, config: ServiceConfig) -> Iterator[ray_serve.Work]:
    threads, digest = config.resources.threads, code_digest()
    yield ray_serve.Work(
        f"{config.name}.service", partial(worked, out, digest), threads, {"OMP_NUM_THREADS": str(threads)}
    )
    if config.tracking.uri is not None:
        yield ray_serve.Work(
            f"{config.name}.registry", partial(delivered, out, digest), 0, {"OMP_NUM_THREADS": "1"}
        )


def _check_room(session: Session, config: ServiceConfig) -> None:
    """Raise ClusterError where the replicas and the work have no room, since Ray would wait for it without end."""
    resources, workers = config.resources, config.serving.workers
    wanted = workers * resources.cpus + resources.threads
    if wanted > session.cpus:
        raise ClusterError(
            f"serving.workers {workers} times resources.cpus {resources.cpus:g}, and resources.threads {resources.threads} for the "
            f"work, are {wanted:g} CPUs; the cluster has {session.cpus:g}. Lower one of them, or add nodes"
        )
    if config.serving.device == "cuda" and workers > session.gpus:
        raise ClusterError(
            f"serving.workers {workers} with serving.device cuda are {workers} GPUs; the cluster has {session.gpus:g}"
        )


def _ending() -> threading.Event:
    """Set by SIGTERM or Ctrl-C; a second one interrupts."""
    ending = threading.Event()

    def signalled(*_: object) -> None:
        if ending.is_set():
            raise KeyboardInterrupt
        ending.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signalled)
    return ending


def _say(name: str, works: list[str], said: dict[str, str | None]) -> None:
    """Print what is wrong, once."""
    for one, found in [(name, ray_serve.trouble(name)), *((work, ray_serve.failing(work)) for work in works)]:
        if found != said.get(one):
            print(f"{one}: {found or 'it is well again'}", file=sys.stderr, flush=True)
        said[one] = found


def _end(name: str, works: list[ray_serve.Work]) -> None:
    for work in works:
        ray_serve.end(work.name)
    ray_serve.silence(name)
