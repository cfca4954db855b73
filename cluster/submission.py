"""Studies as jobs of a remote cluster, over the HTTP interface of Ray's dashboard.

Invariant: each key has at most one unfinished job, however many clients submit it at once; a client that disconnects
changes nothing. The token is sent in a header only: it is never printed and never written.
"""

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from cluster.errors import ClusterError, ClusterLost
from cluster.session import ANSWER_SECONDS, JOINS, require_token

OLDEST_RAY = (2, 59)
"""The oldest supported Ray of a cluster; older ones have no token authentication."""

LOST_SECONDS = 300.0
"""How long a client keeps trying a dashboard that has stopped answering."""

_OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
"""Variables that Ray prefers to the address it is given. They are hidden from Ray, so that the command line decides."""

_TROUBLE = (requests.exceptions.RequestException, aiohttp.ClientError, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Job:
    """One job as the cluster reports it. `exit_code` is that of its command; None before the end or if it never began."""

    id: str
    state: str
    ended: bool
    exit_code: int | None
    message: str
    metadata: dict[str, str]

    @classmethod
    def of(cls, details: JobDetails) -> "Job":
        status = details.status
        return cls(
            details.submission_id or "", status.value.lower(), status.is_terminal(), details.driver_exit_code,
            details.message or "", details.metadata or {},
        )  # fmt: skip


def check_dashboard(url: str) -> None:
    """Refuse a URL that is not a dashboard's, and a remote one without token authentication.

    Raises:
        ClusterError: the URL is not http(s)://HOST[:PORT], or is beyond loopback while RAY_AUTH_MODE is not `token`.
    """
    parts = urlsplit(url)
    try:
        fits = parts.scheme in ("http", "https") and parts.hostname and not parts.username
        fits = fits and (parts.port or True) and parts.path in ("", "/") and not parts.query
    except ValueError:
        fits = False
    if not fits:
        raise ClusterError(
            f"--address {parts._replace(netloc=parts.netloc.rpartition('@')[2]).geturl()!r}: give the address of the head's dashboard, "
            "http://HEAD:8265 or https://HOST"
        )
    require_token(url, parts.hostname or "")


class Cluster:
    """The jobs of the cluster whose dashboard is at `url`.

    Raises ClusterError if no dashboard answers there, or the cluster cannot be used.
    """

    def __init__(self, url: str) -> None:
        check_dashboard(url)
        self.url = url.rstrip("/")
        _check_listening(self.url)
        for kind in JobSubmissionClient.__mro__:
            logging.getLogger(kind.__module__).setLevel(logging.ERROR)
        with self._explained(), _without(_OVERRIDES):
            self.client = JobSubmissionClient(self.url)
        self._check_version(getattr(self.client, "_server_ray_version", None) or ray.__version__)

    def jobs(self) -> list[Job]:
        """All jobs that the cluster remembers, oldest first."""
        with self._explained():
            found = sorted(self.client.list_jobs(), key=lambda details: details.start_time or 0)
        return [Job.of(details) for details in found if details.submission_id]

    def latest(self, key: str) -> tuple[int, Job | None]:
        """The number and the job of the last attempt at `key`; (0, None) before the first."""
        attempts = [
            (int(number), job)
            for job in self.jobs()
            for stem, _, number in [job.id.rpartition(".")]
            if stem == key and number.isdigit()
        ]
        return max(attempts, key=lambda attempt: attempt[0], default=(0, None))

    def submit_or_attach(
        self, key: str, command: str, room: Path, metadata: dict[str, str]
    ) -> tuple[Job, bool]:
        """The unfinished job of `key`, and whether it existed before.

        Args:
            command: run by a shell in a copy of `room` on the head; `room` also comes first on the workers' import
                path.
            metadata: stored with the job; visible to everyone who can see the dashboard.
        """
        while True:
            attempt, job = self.latest(key)
            if job is not None and not job.ended:
                return job, True
            name = f"{key}.{attempt + 1}"
            try:
                self.submit(name, command, room, metadata)
            except _Taken:
                continue
            return self.job(name), False

    def submit(self, name: str, command: str, room: Path, metadata: dict[str, str]) -> None:
        with self._explained():
            environment = {"working_dir": str(room), "env_vars": {JOINS: self._session()}}
            try:
                self.client.submit_job(
                    entrypoint=command, submission_id=name, runtime_env=environment, metadata=metadata
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    raise _Taken(name) from None
                raise

    def _session(self) -> str:
        """The name that the cluster gave itself when its head started."""
        found: str = self.client._do_request("GET", "/api/version").json()["session_name"]
        return found

    def job(self, name: str) -> Job:
        with self._explained():
            return Job.of(self.client.get_job_info(name))

    def stop(self, name: str) -> None:
        with self._explained():
            self.client.stop_job(name)

    def answer(self, name: str, command: str, room: Path) -> tuple[Job, str]:
        """Run a short command to its end and delete its job. Returns the job and what it printed."""
        self.submit(name, command, room, {})
        said: list[str] = []
        job = self.follow(name, said.append)
        with self._explained():
            self.client.delete_job(name)
        return job, "".join(said)

    def follow(self, name: str, write: Callable[[str], Any]) -> Job:
        """Pass the output of a job to `write`, from its beginning, until the job has ended. Raises ClusterLost.

        A connection that breaks is opened again, and the output continues where it stopped.
        """
        seen, trouble = _Seen(write), 0.0
        while True:
            try:
                with _interruptible():
                    asyncio.run(self._tail(name, seen))
                job = Job.of(self.client.get_job_info(name))
                if job.ended:
                    return job
                trouble = 0.0
            except (*_TROUBLE, RuntimeError) as error:
                if "does not exist" in str(error):
                    raise ClusterLost(
                        f"{self.url} no longer knows job {name}: its head was restarted"
                    ) from error
                trouble = trouble or time.monotonic()
                if time.monotonic() - trouble > LOST_SECONDS:
                    raise ClusterLost(
                        f"{self.url} has not answered for {LOST_SECONDS:g} s ({error})"
                    ) from error
            time.sleep(1)

    async def _tail(self, name: str, seen: "_Seen") -> None:
        seen.rewind()
        async for text in self.client.tail_job_logs(name):
            seen.take(text)

    def _check_version(self, version: str) -> None:
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
        if numbers < OLDEST_RAY:
            raise ClusterError(
                f"--address {self.url}: the cluster runs Ray {version}, this machine {ray.__version__}; "
                f"temporal-merge needs {'.'.join(map(str, OLDEST_RAY))} or newer on every node"
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn errors of Ray and of the network into a ClusterError that says what to do."""
        try:
            yield
        except AuthenticationError:
            raise ClusterError(
                f"--address {self.url}: the cluster refuses this machine's token; put the token that its head was started "
                "with into the file that RAY_AUTH_TOKEN_PATH names (or ~/.ray/auth_token)"
            ) from None
        except _TROUBLE as error:
            raise ClusterError(f"--address {self.url}: no dashboard answers there ({error})") from error
        except (RuntimeError, ValueError) as error:
            if isinstance(error, ClusterError):
                raise
            raise ClusterError(f"--address {self.url}: {_gist(error)}") from error


class _Taken(Exception):
    """Another client has just submitted a job of this name."""


class _Seen:
    """Passes on the new part of a log that the dashboard always sends from its beginning."""

    def __init__(self, write: Callable[[str], Any]) -> None:
        self.write, self.passed, self.received = write, 0, 0

    def rewind(self) -> None:
        self.received = 0

    def take(self, text: str) -> None:
        new = text[max(0, self.passed - self.received) :]
        self.received += len(text)
        self.passed = max(self.passed, self.received)
        if new:
            self.write(new)


def _check_listening(url: str) -> None:
    """Raise ClusterError at once if nothing listens at `url`; a request would wait for minutes."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"--address {url}: nothing answers there ({error}); it must be the dashboard of a running head (`ray start --head` "
            "with --dashboard-host, port 8265), reachable from here"
        ) from error


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _gist(error: Exception) -> str:
    """The last informative line of an answer that may hold a traceback of the server."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any("404" in line for line in lines[:1]):
        return "what answers there is no Ray dashboard; give http://HEAD:8265"
    return lines[-1][:500] if lines else type(error).__name__


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end the block. asyncio would cancel its task instead, and an error of a closing connection would hide that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
