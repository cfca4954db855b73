"""A real cluster of two Ray nodes on one machine: each node, and a client, in its own network namespace.

Every node has its own IP, loopback, host name and /tmp/ray; the nodes share the file system. The client reaches only
the head.
Invariant: only processes in namespaces made here are ended, and no namespace outlives the block.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.world import ROOT

HEAD, WORKER = "10.99.1.1", "10.99.1.2"
DASHBOARD = f"http://{HEAD}:8265"
NEEDS = "two nodes in network namespaces need root and the `ip` command of iproute2"
BIN = Path(sys.executable).parent


def possible() -> bool:
    return os.geteuid() == 0 and shutil.which("ip") is not None


class TwoNodes:
    """The namespaces `<prefix>-head`, `-work` and `-client`, and the token that all three share."""

    def __init__(self, home: Path, environment: dict[str, str] | None = None) -> None:
        self.environment = environment or {}
        self.home, self.prefix = home, f"tm{os.getpid() % 100000}"
        self.token = home / "token"
        self.token.touch(0o600)
        self.token.write_text(secrets.token_hex(32))

    def wire(self) -> None:
        """head (10.99.1.1) - worker (10.99.1.2), and head (10.99.2.1) - client (10.99.2.2)."""
        for role in ("head", "work", "client"):
            _ip("netns", "add", f"{self.prefix}-{role}")
            self._in(role, "link", "set", "lo", "up")
        for number, role in ((1, "work"), (2, "client")):
            near, far = f"{self.prefix}h{number}", f"{self.prefix}p{number}"
            _ip("link", "add", near, "netns", f"{self.prefix}-head", "type", "veth", "peer", "name", far, "netns", f"{self.prefix}-{role}")  # fmt: skip
            for where, name, last in (("head", near, 1), (role, far, 2)):
                self._in(where, "addr", "add", f"10.99.{number}.{last}/24", "dev", name)
                self._in(where, "link", "set", name, "up")
        self._in("client", "route", "add", HEAD, "via", "10.99.2.1")

    def start(self) -> None:
        """Start head and worker, with token authentication and one CPU each."""
        common = [
            "--block",
            "--num-cpus=1",
            "--num-gpus=0",
            f"--object-store-memory={96 * 2**20}",
            "--disable-usage-stats",
        ]
        self._ray("head", "--head", f"--node-ip-address={HEAD}", f"--dashboard-host={HEAD}", *common)
        self._ray("work", f"--address={HEAD}:6379", f"--node-ip-address={WORKER}", *common)

    def client(self, *arguments: Any, **options: Any) -> subprocess.Popen[str]:
        """`temporal-merge ...` in the client's namespace."""
        argv = [
            "ip",
            "netns",
            "exec",
            f"{self.prefix}-client",
            sys.executable,
            "-m",
            "pipeline.cli",
            *map(str, arguments),
        ]
        return subprocess.Popen(
            argv, text=True, env=self._environment() | {"PYTHONPATH": str(ROOT)}, **options
        )

    def link(self, up: bool) -> None:
        """Cut or restore the network of the worker."""
        self._in("head", "link", "set", f"{self.prefix}h1", "up" if up else "down")

    def remove(self) -> None:
        """End all processes in the namespaces, then remove the namespaces."""
        for role in ("client", "work", "head"):
            name = f"{self.prefix}-{role}"
            for _ in range(20):
                answer = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
                pids = [int(pid) for pid in answer.stdout.split()]
                if not pids:
                    break
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.2)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def _ray(self, role: str, *arguments: str, seconds: float = 120) -> None:
        private, log = self.home / f"ray-{role}", self.home / f"{role}.log"
        private.mkdir()
        Path("/tmp/ray").mkdir(exist_ok=True)
        script = f'hostname node-{role}; mount --bind "{private}" /tmp/ray; exec "{BIN / "ray"}" start "$@"'
        argv = [
            "ip",
            "netns",
            "exec",
            f"{self.prefix}-{role}",
            "unshare",
            "--uts",
            "sh",
            "-ec",
            script,
            "ray",
            *arguments,
        ]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                argv, env=self._environment(), stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, start_new_session=True
            )  # fmt: skip
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and process.poll() is None:
            if b"Ray runtime started" in log.read_bytes():
                return
            time.sleep(0.2)
        raise RuntimeError(f"Ray's {role} did not start: {log.read_text()[-2000:]}")

    def _environment(self) -> dict[str, str]:
        """The environment of another machine: no variable of Ray on this one, and the token in a file."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "PYTHON", "TEMPORAL_"))
        }
        return kept | {
            "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token),
            "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
        } | self.environment  # fmt: skip

    def _in(self, role: str, *arguments: str) -> None:
        _ip("-n", f"{self.prefix}-{role}", *arguments)


@contextlib.contextmanager
def two_nodes(home: Path, environment: dict[str, str] | None = None) -> Iterator[TwoNodes]:
    """Both nodes, running; `environment` is added to that of every process there."""
    nodes = TwoNodes(home, environment)
    try:
        nodes.wire()
        nodes.start()
        yield nodes
    finally:
        nodes.remove()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
