"""What a Ray cluster keeps running: an ASGI application in replicas of Ray Serve, and work in named actors.

Both outlive the process that started them, so a service goes on when its command is lost, and the same command finds it again. This is
the only module that imports Ray Serve, whose interfaces move; what is served is a parameter.
Invariant: nothing here replaces a replica but `answer`; whoever finds the stamp of what it would start has nothing to start.
"""

import contextlib
import importlib.util
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from cluster.errors import ClusterError

if TYPE_CHECKING:
    from ray.serve.config import HTTPOptions

NEEDED = ("grpc_reflection",)
"""What `ray.serve` imports and `ray[default]` does not install."""
NAMESPACE = "temporal-merge"
FIRST_WAIT, LAST_WAIT = 0.5, 30.0
"""Seconds before work that failed begins again: twice as long each time."""
STARTING_SECONDS = 180.0
"""Patience with proxies that start."""
ENDING_SECONDS = 40.0
"""Patience with work that ends."""

App = Callable[..., Awaitable[None]]
"""An ASGI application."""


@dataclass(frozen=True)
class Door:
    """Where the proxies of Ray Serve listen, on every node that has a replica; with the paths of a certificate and its key in TLS."""

    host: str
    port: int
    certificate: str | None = None
    key: str | None = None


@dataclass(frozen=True)
class Application:
    """`build` makes the application in each replica, and is pickled. `stamp` names what it makes. A replica has `ongoing` requests at a
    time, and `grace` seconds to answer them when it ends."""

    name: str
    stamp: str
    build: Callable[[], App]
    replicas: int
    cpus: float
    gpus: float
    ongoing: int
    grace: float


def check_installed() -> None:
    """Raise ClusterError where Ray Serve cannot be imported."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ClusterError(
            f"Ray Serve cannot be imported here: {', '.join(missing)} is missing; install it on every node with "
            "`pip install 'temporal-merge[serve]'`"
        )


def check_door(door: Door) -> bool:
    """Whether Ray Serve runs on the connected cluster, with this door. Raises ClusterError if it runs with another one: there is one
    for all applications of a cluster, and it never changes."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return False
    found = client.http_config
    theirs = Door(str(found.host), found.port, found.ssl_certfile, found.ssl_keyfile)
    if theirs != door:
        raise ClusterError(
            f"Ray Serve runs on this cluster already and listens at {theirs.host}:{theirs.port}"
            f"{' with TLS' if theirs.certificate else ''}; give `listen` the same, or end it (`serve shutdown`)"
        )
    return True


def stamp_of(name: str) -> str | None:
    """The stamp of the application of this name that runs; None if none does."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        found = serve.status().applications.get(name)
        if found is None or found.status != "RUNNING":
            return None
        stamp: str = (
            serve.get_deployment_handle(_REPLICA, name).stamp.remote().result(timeout_s=ENDING_SECONDS)
        )
    except (RayServeException, ray.exceptions.RayError, TimeoutError):
        return None
    return stamp


def answer(application: Application, door: Door) -> None:
    """Let the connected cluster answer with an application at "/", and return when all replicas do. Replicas of another stamp are
    replaced one after the other. Raises ClusterError."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with contextlib.suppress(ray.exceptions.RayError, TimeoutError):  # Ray starts a slow proxy again
        serve.start(
            proxy_location="EveryNode",
            http_options=_options(door),
            controller_options={"runtime_env": {"env_vars": {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}}},
        )
    build, stamp = application.build, application.stamp

    def make() -> App:  # a plain function, which Ray Serve tells from an application
        return build()

    class Replica:
        def stamp(self) -> str:
            return stamp

    configured: Any = serve.deployment(
        name=_REPLICA,
        num_replicas=application.replicas,
        max_ongoing_requests=application.ongoing,
        graceful_shutdown_timeout_s=application.grace,
        ray_actor_options={"num_cpus": application.cpus, "num_gpus": application.gpus},
    )
    replica = configured(serve.ingress(make)(Replica))
    try:
        serve.run(replica.bind(), name=application.name, route_prefix="/")
        _wait_for_proxies()
    except (RayServeException, RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
        raise ClusterError(f"Ray Serve does not run {application.name}: {error}") from error


def trouble(name: str) -> str | None:
    """What is wrong with an application, in Ray Serve's words; None if nothing is."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        found = serve.status().applications.get(name)
    except (RayServeException, ray.exceptions.RayError) as error:
        return f"{type(error).__name__}: {error}"
    if found is None:
        return "it is not there any more"
    return None if found.status == "RUNNING" else f"{found.status}: {found.message}".rstrip(": ")


def silence(name: str) -> None:
    """End an application after what it accepted is answered, and Ray Serve with the last one."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    with contextlib.suppress(RayServeException):  # Ray Serve does not run
        serve.delete(name)
        if not serve.status().applications:
            serve.shutdown()


_REPLICA = "answers"


def _wait_for_proxies() -> None:
    """Return when all proxies listen. Raises TimeoutError."""
    from ray import serve

    deadline = time.monotonic() + STARTING_SECONDS
    while not (found := serve.status().proxies) or any(one != "HEALTHY" for one in found.values()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"its proxies do not listen after {STARTING_SECONDS:g} s: {found}")
        time.sleep(0.2)


def _options(door: Door) -> "HTTPOptions":
    from ray.serve.config import HTTPOptions

    return HTTPOptions(host=door.host, port=door.port, ssl_certfile=door.certificate, ssl_keyfile=door.key)


class _Working:
    """Does work in a thread, from its start on, and again when it fails; Ray starts it anew when its process ends."""

    def __init__(self, work: Callable[[threading.Event], None]) -> None:
        self._work, self._ending, self._trouble = work, threading.Event(), ""
        self._thread = threading.Thread(target=self._keep, name="work", daemon=True)
        self._thread.start()

    def trouble(self) -> str:
        """Why the work failed last; empty if it never did."""
        return self._trouble

    def end(self) -> bool:
        """End the work; whether it has ended in time."""
        self._ending.set()
        self._thread.join(ENDING_SECONDS)
        return not self._thread.is_alive()

    def _keep(self) -> None:
        wait = FIRST_WAIT
        while not self._ending.is_set():
            began = time.monotonic()
            try:
                self._work(self._ending)
            except Exception as error:
                self._trouble = f"{type(error).__name__}: {error}"
                wait = FIRST_WAIT if time.monotonic() - began > 2 * LAST_WAIT else wait
                self._ending.wait(wait)
                wait = min(2 * wait, LAST_WAIT)


@dataclass(frozen=True)
class Work:
    """Work that goes on until an event is set: `does` is pickled. Its process has the variables of `environment`."""

    name: str
    does: Callable[[threading.Event], None]
    cpus: float
    environment: Mapping[str, str]


def keep(work: Work) -> None:
    """Let the connected cluster do some work from now on; what did the work of this name before has ended then."""
    end(work.name)
    kept: Any = ray.remote(_Working).options(
        name=work.name, namespace=NAMESPACE, lifetime="detached", num_cpus=work.cpus, max_restarts=-1, max_concurrency=4,
        runtime_env={"env_vars": dict(work.environment)},
    )  # fmt: skip
    kept.remote(work.does)


def end(name: str) -> None:
    """End the work of this name, if there is any."""
    found = _named(name)
    if found is None:
        return
    with contextlib.suppress(ray.exceptions.RayError, TimeoutError):  # it hangs, or its process has ended
        ray.get(found.end.remote(), timeout=ENDING_SECONDS + 10)
    ray.kill(found, no_restart=True)


def failing(name: str) -> str | None:
    """Why the work of this name failed last; None if it never did, or while its process begins again."""
    found = _named(name)
    if found is None:
        return "it is not there any more"
    try:
        said: str = ray.get(found.trouble.remote(), timeout=10)
    except (ray.exceptions.RayError, TimeoutError):
        return None
    return said or None


def _named(name: str) -> Any:
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None
