"""One Ray session for the length of a study: started here, or joined.

Invariant: a session never listens, or talks, beyond this machine without Ray's token authentication, and it never ends
processes that it did not start.
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
from typing import Any, Self

import ray

from cluster.room import Node

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Hosts for which a missing token is tolerated."""


class ClusterError(ValueError):
    """The cluster cannot be reached or must not be used as it is."""

    exit_code = 2


class ClusterLost(Exception):
    """The cluster under a running study is gone, or no longer tells what becomes of a job."""


ANSWER_SECONDS = 10.0
"""How long a cluster's head may take to accept a connection; Ray itself would go on trying for minutes."""

KNOCK_SECONDS, LOST_SECONDS, HANG_SECONDS = 2.0, 15.0, 15.0
"""How often a running study knocks at its cluster's head, how long that may fail, and then how long a call of Ray may hang."""

OBJECT_STORE_BYTES = 256 * 2**20
"""Small records only travel through Ray; weights go by path."""


@dataclass(frozen=True)
class Session:
    """A connected Ray session and the nodes it had at first."""

    address: str
    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)


class Head:
    """Watches the head of the cluster this process is connected to, for the length of a `with` block.

    Ray's own calls wait for a lost head, some without an end, until Ray ends the process without a word of ours. So a
    thread knocks at its door; whoever still runs learns of the loss by `check`, and a process that hangs in Ray is ended.
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
        """Whether the head answers now. Raises ClusterLost once it has not for LOST_SECONDS."""
        if self._lost:
            raise ClusterLost(self._lost)
        return self.answers

    def _watch(self) -> None:
        host, _, port = self.address.rpartition(":")
        since = time.monotonic()
        while not self._over.wait(KNOCK_SECONDS):
            try:
                socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()
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
    """The nodes that are alive, each with all its CPUs and GPUs, by id."""
    alive = (node for node in ray.nodes() if node["Alive"])
    found = (
        Node(node["NodeID"], node["NodeManagerAddress"], has.get("CPU", 0.0), has.get("GPU", 0.0))
        for node in alive
        for has in (node["Resources"],)
    )
    return tuple(sorted(found, key=lambda node: node.id))


def check_address(address: str) -> None:
    """Refuse a remote cluster without token authentication.

    Raises:
        ClusterError: `HOST:PORT` beyond loopback while RAY_AUTH_MODE is not `token`.
    """
    if address in ("local", "auto"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(f"--address {address!r}: give `local`, `auto` or HOST:PORT")
    require_token(address, host)


def require_token(address: str, host: str) -> None:
    """Raise ClusterError if `host` is another machine's and RAY_AUTH_MODE is not `token`."""
    if host not in LOOPBACK and os.environ.get("RAY_AUTH_MODE") != "token":
        raise ClusterError(
            f"--address {address}: Ray on another machine without token authentication lets anyone run code there; "
            "start the head with RAY_AUTH_MODE=token, copy its token, and set RAY_AUTH_MODE=token here"
        )


def _knock(address: str) -> None:
    """Raise ClusterError at once if nobody listens at HOST:PORT."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"--address {address}: no Ray cluster answers there ({error}); start its head, mend the address, or leave "
            "--address out to use this machine"
        ) from error


def _environment(threads: int) -> dict[str, str]:
    """Environment of every worker process: explicit thread counts, nothing phoned home, no code out of shards."""
    count = str(threads)
    ours = {name: value for name, value in os.environ.items() if name.startswith("TEMPORAL_MERGE_")}
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
    """Start (`local`) or join (`auto`, `HOST:PORT`) a Ray cluster, and leave it at the end.

    Args:
        address: `local` starts one on this machine, without dashboard and on loopback only.
        threads: threads per worker process; part of what makes results bit-identical.
        cpus: how many CPUs a local cluster offers; default: those of this machine.

    Raises:
        ClusterError: the address is unsafe or nobody answers there.
    """
    check_address(address)
    # Ray puts a handler of its own into the main thread, which ends the process with another exit code.
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if in_main else None
    runtime = {"env_vars": _environment(threads)}
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "runtime_env": runtime}
    try:
        if address == "local":
            os.environ.update(_environment(threads))
            _start_local(cpus or os.cpu_count() or 1, quiet)
        else:
            if address != "auto":
                _knock(address)
            ray.init(address=address, **quiet)
    except (ConnectionError, TimeoutError) as error:
        raise ClusterError(f"--address {address}: no Ray cluster answers there ({error})") from error
    except SystemExit as ended:  # Ray's handler, which exits with the bare number
        raise SystemExit(128 + signal.SIGTERM if ended.code == signal.SIGTERM else ended.code) from ended
    if handler is not None:
        signal.signal(signal.SIGTERM, handler)
    try:
        yield Session(address, nodes_now())
    finally:
        with _undisturbed():
            ray.shutdown()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Put off SIGINT and SIGTERM until the block is over: Ray ends a process that leaves it halfway, with another exit code."""
    put_off: list[int] = []
    kept = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            kept[number] = signal.signal(number, lambda sent, _: put_off.append(sent))
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    for sent in put_off[:1]:
        signal.raise_signal(sent)


def _start_local(cpus: int, options: dict[str, Any], tries: int = 3) -> None:
    """Start a cluster on loopback; on a machine that is busy for a while its parts may need a second try to meet."""
    for left in reversed(range(tries)):
        try:
            ray.init(
                address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES,
                _node_ip_address="127.0.0.1", **options,
            )  # fmt: skip
            return
        except Exception as error:
            ray.shutdown()
            if not left or "timed out during startup" not in str(error):
                raise ClusterError(f"Ray does not start on this machine: {error}") from error
