"""A tracking server that is down, fails and comes back, or loses data: whole runs of a study."""

import json
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import PATIENCE, created, run, tracked, wait_until
from tests.servers import free_port, mlflow_at
from tests.world import Cluster, World, artifacts, command, start

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos]


def pending(out: Path) -> int:
    answer = command("status", out, "--json")
    assert answer.returncode == 0, answer.stderr
    return int(json.loads(answer.stdout)["tracker_pending"])


@pytest.mark.fault("F10")
def test_tracker_that_never_answers_costs_a_run_nothing_and_sync_delivers_once(
    world: World, cluster: Cluster, undisturbed: Path, tmp_path: Path, record_property: Any
) -> None:
    out, port = tmp_path / "out", free_port()
    uri = f"http://127.0.0.1:{port}"
    answer = run(world.study(tracking={"uri": uri}), out, cluster)
    assert answer.returncode == 0, answer.stderr
    told = re.search(r"(\d+) rows are pending .*temporal-merge sync", answer.stdout)
    waiting = pending(out)
    assert told and int(told[1]) == waiting > 50, answer.stdout
    record_property("rows waiting, then delivered once", str(waiting))
    assert artifacts(out) == artifacts(undisturbed)
    with mlflow_at(port, tmp_path):
        assert command("sync", out).returncode == 0
        once = tracked(uri)
        assert command("sync", out).returncode == 0
        assert tracked(uri) == once == tracked(undisturbed)
    assert pending(out) == 0


@pytest.mark.fault("F10")
def test_tracker_that_goes_and_comes_back_has_everything_once(
    world: World, cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    out, port = tmp_path / "out", free_port()
    uri = f"http://127.0.0.1:{port}"
    study = world.study(tracking={"uri": uri})
    with mlflow_at(port, tmp_path):
        process = start("run", study, "--out", out, "--address", cluster.address)
        wait_until(lambda: len(created(out)) >= 6, "no steps end")
    wait_until(lambda: len(created(out)) >= 12 or process.poll() is not None, "steps wait for the tracker")
    with mlflow_at(port, tmp_path):
        said = process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == 0, said
        assert command("sync", out).returncode == 0
        assert tracked(uri) == tracked(undisturbed)
    assert pending(out) == 0


class Unreliable(BaseHTTPRequestHandler):
    """A proxy that fails three requests in ten, loses two answers in ten, and delays one in fifty."""

    target, rng, lock = "", random.Random(11), threading.Lock()
    counts = {"failed": 0, "stored, but their answers lost": 0, "kept waiting for 3 s": 0}

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.lock:
            chance, late = self.rng.random(), self.rng.random() < 0.02
        if late:
            self.counts["kept waiting for 3 s"] += 1
            time.sleep(3)
        if chance < 0.3:
            self.counts["failed"] += 1
            self._answer(500, b"{}")
            return
        request = urllib.request.Request(
            self.target + self.path, data=body or None, method=self.command,
            headers={"Content-Type": self.headers.get("Content-Type") or "application/json"},
        )  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                code, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            code, content = error.code, error.read()
        if 0.3 <= chance < 0.5:
            self.counts["stored, but their answers lost"] += 1
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self._answer(code, content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

    def _answer(self, code: int, content: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.fault("F11")
@pytest.mark.timeout(500)
def test_tracker_that_fails_stalls_and_loses_answers_ends_with_everything_once(
    world: World, cluster: Cluster, undisturbed: Path, tmp_path: Path, record_property: Any
) -> None:
    out = tmp_path / "out"
    with mlflow_at(None, tmp_path) as Unreliable.target:
        proxy = ThreadingHTTPServer(("127.0.0.1", 0), Unreliable)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            uri = f"http://127.0.0.1:{proxy.server_address[1]}"
            answer = run(world.study(tracking={"uri": uri}), out, cluster)
            assert answer.returncode == 0, answer.stderr
            for _ in range(20):
                if command("sync", out).returncode == 0:
                    break
        finally:
            proxy.shutdown()
            proxy.server_close()
        assert pending(out) == 0
        assert tracked(Unreliable.target) == tracked(undisturbed)
    assert min(Unreliable.counts.values()) >= 3, Unreliable.counts
    for what, count in Unreliable.counts.items():
        record_property(f"requests {what}", str(count))
