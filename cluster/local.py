"""A Ray cluster on this machine only, for the duration of a study.

Invariant: every port is bound to loopback, every connection needs a token, and no writable home directory is needed.
"""

import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants

from cluster.errors import ClusterError

LOOPBACK = ("127.0.0.1", "localhost", "::1")

OBJECT_STORE_BYTES = 256 * 2**20
"""Small, because only records travel through Ray; weights are passed by path."""

SOCKET_PATH_BYTES = 107
"""Maximum length of the path of a Unix socket on Linux."""

SOCKET_OF_A_SESSION = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""The longest socket path below Ray's temporary directory."""

SHORT_PLACES = ("/tmp", "/var/tmp", "/dev/shm")
"""Fallbacks for Ray's sockets and logs if the configured directory has too long a path or is not writable."""


def start_local(cpus: int, options: dict[str, Any], tries: int = 3) -> None:
    """Start the cluster and connect to it. On a busy machine Ray may time out at startup, so it gets several tries.

    Raises:
        ClusterError: Ray does not start, has no directory for its sockets, or listens on more than loopback.
    """
    place = temporary_directory(
        os.environ, say=lambda text: print(f"note: {text}", file=sys.stderr, flush=True)
    )
    _ensure_token(os.environ)
    for left in reversed(range(tries)):
        try:
            with _bound_to_loopback():
                ray.init(
                    address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=str(place), **options,
                )  # fmt: skip
            break
        except Exception as error:
            ray.shutdown()
            if not left or "timed out during startup" not in str(error):
                raise ClusterError(f"Ray does not start on this machine: {error}") from error
    address = ray.get_runtime_context().gcs_address
    if address.rpartition(":")[0].strip("[]") not in LOOPBACK:
        ray.shutdown()
        raise ClusterError(
            f"Ray {ray.__version__} listens at {address} instead of on loopback alone; use a version with which "
            "temporal-merge is tested (2.60)"
        )


def temporary_directory(environment: Mapping[str, str], say: Callable[[str], None]) -> Path:
    """Ray's directory for sockets and logs: below RAY_TMPDIR or TMPDIR, or a fallback, which `say` reports.

    Raises ClusterError, which names the variable to set, if no directory can be used.
    """
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if environment.get(name)), None)
    configured = environment[variable] if variable else tempfile.gettempdir()
    reasons = []
    for parent in dict.fromkeys((configured, *SHORT_PLACES)):
        for name in ("ray", f"ray-{os.getuid()}"):
            place = Path(parent).absolute() / name
            if reason := _unfit(place):
                reasons.append(f"{place}: {reason}")
            else:
                if variable and parent != configured:
                    say(f"Ray's sockets and logs go to {place} instead of {variable} ({reasons[0]})")
                return place
    raise ClusterError(
        f"Ray finds no directory for its sockets ({'; '.join(reasons)}); set RAY_TMPDIR to a directory that you may write "
        f"to, with a path of at most {SOCKET_PATH_BYTES - len(SOCKET_OF_A_SESSION)} characters"
    )


def _unfit(place: Path) -> str:
    """Why Ray cannot place its sockets below `place`; empty if it can."""
    length = len(os.fsencode(place.parent)) + len(place.name) - len("ray") + len(SOCKET_OF_A_SESSION)
    if length > SOCKET_PATH_BYTES:
        return f"a socket there has a path of {length} bytes, {SOCKET_PATH_BYTES} are allowed"
    there = place if place.exists() else place.parent
    if not there.is_dir():
        return "no directory"
    return "" if os.access(there, os.W_OK | os.X_OK) else "not writable"


def _ensure_token(environment: MutableMapping[str, str]) -> None:
    """Create a token for this process and its cluster if Ray would otherwise write one into the home directory."""
    if environment.get("RAY_AUTH_TOKEN") or environment.get("RAY_AUTH_TOKEN_PATH"):
        return
    if not (Path(os.path.expanduser("~")) / ".ray" / "auth_token").is_file():  # noqa: PTH111 - Path's own raises without a home
        environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextmanager
def _bound_to_loopback() -> Iterator[None]:
    """Make Ray bind its servers to 127.0.0.1, which it would otherwise replace by the address of the machine.

    Ray uses this switch on other systems. Processes that Ray starts read the variable; this process has read it
    already.
    """
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    kept = os.environ.get(name)
    ray_constants.ENABLE_RAY_CLUSTER, os.environ[name] = False, "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        os.environ.pop(name)
        if kept is not None:
            os.environ[name] = kept
