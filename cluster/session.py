"""One Ray session for the duration of a study: a local cluster that is started, or an existing one that is joined.

Invariant: every session uses Ray's token authentication, a local cluster listens on loopback only, and a session never
ends processes that it did not start.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ray
from ray import _raylet
from ray._private import utils as ray_utils
from ray.exceptions import AuthenticationError

from cluster.capacity import Node
from cluster.code import own_code_first
from cluster.errors import ClusterError, ClusterLost
from cluster.local import LOOPBACK, start_local

ANSWER_SECONDS = 10.0
"""Timeout for connecting to the head of a cluster; Ray itself would retry for minutes."""

JOINS = "TEMPORAL_MERGE_JOINS"
"""The environment variable of a job with the name of the cluster that runs it."""

PROBE_SECONDS, LOST_SECONDS, HANG_SECONDS = 2.0, 15.0, 15.0
"""The interval between probes of a cluster's head, how long probes may fail, and how long a call of Ray may then hang."""


@dataclass(frozen=True)
class Session:
    """A connected Ray session and the nodes it had at its start."""

    address: str
    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)


class Head:
    """Watches the head of the connected cluster for the duration of a `with` block.

    Ray's own calls wait for a lost head, some without a timeout, until Ray ends the process without an error message.
    So a thread probes the head. Running code learns of the loss from `check`; a process that hangs in Ray is ended.
    """

    def __init__(self) -> None:
        self.address = ray.get_runtime_context().gcs_address
        self.answers, self._lost, self._over = True, "", threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, name="head", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def check(self) -> bool:
        """Whether the head answers now. Raises ClusterLost once it has not answered for LOST_SECONDS."""
        if self._lost:
            raise ClusterLost(self._lost)
        return self.answers

    def _watch(self) -> None:
        host, _, port = self.address.rpartition(":")
        since = time.monotonic()
        while not self._over.wait(PROBE_SECONDS):
            try:
                socket.create_connection((host, int(port)), timeout=PROBE_SECONDS).close()
            except OSError as error:
                self.answers, silent = False, time.monotonic() - since
                if silent > LOST_SECONDS:
                    self._lost = (
                        f"cluster lost: its head at {self.address} does not answer any more ({error}). Finished steps are "
                        "kept: start the cluster again and give the same command"
                    )
                if silent > LOST_SECONDS + HANG_SECONDS:
                    print(f"failed: ClusterLost: {self._lost}", file=sys.stderr, flush=True)
                    os._exit(1)
            else:
                self.answers, since = True, time.monotonic()


def nodes_now() -> tuple[Node, ...]:
    """The live nodes with their total CPUs and GPUs, sorted by id."""
    alive = (node for node in ray.nodes() if node["Alive"])
    found = (
        Node(node["NodeID"], node["NodeManagerAddress"], has.get("CPU", 0.0), has.get("GPU", 0.0))
        for node in alive
        for has in (node["Resources"],)
    )
    return tuple(sorted(found, key=lambda node: node.id))


def check_address(address: str) -> None:
    """Refuse a cluster without token authentication.

    Raises:
        ClusterError: `address` is not an address, or RAY_AUTH_MODE is not `token`.
    """
    host = LOOPBACK[0]
    if address not in ("local", "auto"):
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if not host or not port.isdigit():
            raise ClusterError(f"--address {address!r}: give `local`, `auto` or HOST:PORT")
    require_token(address, host)


def require_token(address: str, host: str) -> None:
    """Raise ClusterError if RAY_AUTH_MODE is not `token`. On this machine it may be unset, since Ray then uses a token."""
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is not None and mode.lower() == "token":
        return
    if host not in LOOPBACK:
        raise ClusterError(
            f"--address {address}: Ray on another machine without token authentication lets anyone run code there; "
            "start the head with RAY_AUTH_MODE=token, copy its token, and set RAY_AUTH_MODE=token here"
        )
    if mode is not None:
        raise ClusterError(
            f"--address {address}: with RAY_AUTH_MODE={mode} anyone who reaches Ray's ports, also another user of this machine, "
            "runs code as you; unset RAY_AUTH_MODE or set it to token (for a cluster that is there: on its nodes as well)"
        )


def _check_listening(address: str) -> None:
    """Raise ClusterError at once if nothing listens at HOST:PORT."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"--address {address}: no Ray cluster answers there ({error}); start its head, correct the address, or leave "
            "--address out to use this machine"
        ) from error


def _environment(threads: int) -> dict[str, str]:
    """The environment of every worker process: explicit thread counts, no telemetry, no code from shards."""
    count = str(threads)
    ours = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("TEMPORAL_MERGE_")
        and name != JOINS  # Ray refuses what a job's environment sets already
    }
    return ours | {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "WDS_SECURE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


@contextmanager
def connect(address: str = "local", *, threads: int = 1, cpus: int | None = None) -> Iterator[Session]:
    """Start (`local`) or join (`auto`, `HOST:PORT`) a Ray cluster, and disconnect at the end.

    Args:
        address: `local` starts one on this machine, without dashboard and on loopback only.
        threads: threads per worker process; bit-identical results need the same number.
        cpus: number of CPUs that a local cluster offers; default: those of this machine.

    Raises:
        ClusterError: the address is unsafe or no cluster answers there.
    """
    check_address(address)
    _reload_token_mode()
    root = str(Path(__file__).parent.parent)
    runtime = {
        "env_vars": _environment(threads),
        "worker_process_setup_hook": own_code_first(root if address == "local" else None, keep_path=True),
    }
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "runtime_env": runtime}
    try:
        with _signal_handlers_kept():
            if address == "local":
                os.environ.update(_environment(threads))
                start_local(cpus or os.cpu_count() or 1, quiet)
            else:
                if address != "auto":
                    _check_listening(address)
                ray.init(address=address, **quiet)
    except (ConnectionError, TimeoutError) as error:
        raise ClusterError(f"--address {address}: no Ray cluster answers there ({error})") from error
    except AuthenticationError as error:
        raise ClusterError(
            f"--address {address}: the cluster requires its token, and this machine has none or another one; put the token that its "
            "head was started with into the file that RAY_AUTH_TOKEN_PATH names (or ~/.ray/auth_token)"
        ) from error
    try:
        if address == "auto":
            _check_joined()
        yield Session(address, nodes_now())
    finally:
        with _signals_deferred():
            ray.shutdown()


def _check_joined() -> None:
    """Raise ClusterError in a job's driver that joined another cluster than the one that runs the job.

    Ray's supervisor of a job looks for the newest head of its machine, not for its own.
    """
    wanted, found = os.environ.get(JOINS), ray.get_runtime_context().get_session_name()
    if wanted not in (None, found):
        raise ClusterError(
            f"this job was submitted to the Ray cluster {wanted} and joined {found}: several heads run on this machine, and Ray "
            "takes the newest; start each head with a `--temp-dir` of its own, then submit again"
        )


def _reload_token_mode() -> None:
    """Make Ray's core read RAY_AUTH_MODE again: it is read at import, perhaps before this package was imported."""
    core: Any = _raylet
    if os.environ.get("RAY_AUTH_MODE") and core.get_authentication_mode() != core.AuthenticationMode.TOKEN:
        core.Config.initialize("")


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Keep the signal handlers of this process.

    Ray installs a Python handler for SIGTERM in the main thread. Its core installs another one below Python, which
    aborts the process; setting our handler again removes the latter.
    """
    theirs = ray_utils.set_sigterm_handler
    ray_utils.set_sigterm_handler = lambda _: None
    try:
        yield
    finally:
        ray_utils.set_sigterm_handler = theirs
        ours = signal.getsignal(signal.SIGTERM)
        if ours is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """Defer SIGINT, SIGTERM and SIGHUP to the end of the block, because Ray ends an interrupted process with another
    exit code.
    """
    deferred: list[int] = []
    kept = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            kept[number] = signal.signal(number, lambda sent, _: deferred.append(sent))
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    for sent in deferred[:1]:
        signal.raise_signal(sent)
