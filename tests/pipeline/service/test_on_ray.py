"""The service on a Ray cluster, from outside: two replicas of Ray Serve, the work in an actor, and the command that watches them."""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle, islice, pairwise
from pathlib import Path

import httpx2
import psutil
import pytest
import yaml

from pipeline.service.settings import Setup
from pipeline.service.verify import replay, verify
from tests.pipeline.service.outside import Asked, Load, Running, until
from tests.pipeline.service.test_together import COMMAND, TINY, expert
from tests.servers import free_port
from tests.serving_toys import sha256_of
from tests.world import ROOT, Cluster
from workers.serving.served import HeadFile, Served

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(
        find_spec("grpc_reflection") is None,
        reason="Ray Serve needs the extra [serve]",
    ),
]
PATIENCE = 900
"""Seconds for what takes long where the machine is busy: starting Ray Serve, and its replicas."""
TASKS = ("letters", "scripts")
SWAPS = int(os.environ.get("SOAK_SWAPS", "20"))
"""Rollbacks under load, of which each ends when both replicas serve it."""


@dataclass
class OnRay:
    """A service on a cluster of its own, and the command that serves it."""

    cluster: Cluster
    config: Path
    out: Path
    faults: str = "{}"
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.out.parent / "serve.log"

    def start(self) -> None:
        """Give the command, and wait until both replicas answer."""
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                [*COMMAND, "serve", str(self.config), "--out", str(self.out)],
                stdout=sink, stderr=sink, cwd=ROOT, start_new_session=True,
                env={**os.environ, "TEMPORAL_MERGE_FAULTS": self.faults},
            )  # fmt: skip
        said = self.log.read_text().count("listening on")
        until(
            lambda: self.process.poll() is not None or self.log.read_text().count("listening on") > said,
            PATIENCE,
        )
        assert self.process.poll() is None, self.log.read_text()
        until(lambda: len(self.asked.served()) == 2, PATIENCE)

    @property
    def asked(self) -> Running:
        """The service, as clients see it."""
        assert self.process is not None
        tree, door = yaml.safe_load(self.config.read_text()), self.out / "service/zoo/door"
        setup = Setup(
            name="zoo", home=TINY, head=self.out / "service/zoo/head.json", state=door,
            serving={"workers": 2}, listen=tree["listen"],
        )  # fmt: skip
        token = (door / "service.token").read_text().strip()
        return Running(
            self.process, setup, HeadFile(setup.head), {"reader": token, "operator": token}, self.log
        )

    def processes(self, title: str) -> list[psutil.Process]:
        """The processes of the cluster whose title begins so."""
        found = []
        for one in psutil.Process(self.cluster.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if (one.cmdline() or [""])[0].startswith(title):
                    found.append(one)
        return found

    def arrive(self, seed: int, task: str) -> None:
        """Send an expert by the command line, and wait until it is decided."""
        service = self.asked
        came = subprocess.run(
            [*COMMAND, "arrive", str(expert(self.out.parent, seed)), "--task", task, "--wait"],
            env={**os.environ, "TEMPORAL_MERGE_URL": service.url, "TEMPORAL_MERGE_TOKEN": service.tokens["operator"]},
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE,
        )  # fmt: skip
        assert came.returncode == 0 and "promoted" in came.stdout, came.stdout + came.stderr

    def roll_back(self, t: int) -> str:
        """Serve time step `t`; the sha256 that both replicas then serve."""
        service = self.asked
        body = {"t": t, "reason": "a test"}
        answer = httpx2.post(f"{service.url}/v1/rollback", json=body, headers=service.headers(), timeout=120)
        assert answer.status_code == 200, answer.text

        def wanted() -> str:
            return str((service.head.current() or Served(-1, "", "", Path(), 0)).sha256)

        until(lambda: service.head.current() is not None and service.head.current().t == t, PATIENCE)  # type: ignore[union-attr]
        until(lambda: sorted(service.served().values()) == [wanted()] * 2, PATIENCE)
        return wanted()


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnRay]:
    """A service that has accepted two experts."""
    room = tmp_path_factory.mktemp("ray")
    cluster = Cluster(room)
    tree = {
        "name": "zoo",
        "model": {"config": "tiny-clip", "pretrained": str(TINY)},
        "strategy": "offline_merging",
        "tasks": {"open": True, "list": list(TASKS)},
        "gates": {"solo": {"required": False}, "geometry": {"reference": {"norm": 1.0}, "low": 0.001, "high": 1000}},
        "serving": {"workers": 2},
        "listen": {"port": free_port()},
        "resources": {"home": "ray", "address": cluster.address, "cpus": 0.5},
    }  # fmt: skip
    config, marker = room / "service.yaml", room / "fired"
    config.write_text(yaml.safe_dump(tree))
    killed = f'{{"merge.after_commit": {{"at": 1, "marker": "{marker}"}}}}'
    one = OnRay(cluster, config, room / "zoo", killed)
    try:
        one.start()
        for seed, task in enumerate(TASKS):
            one.arrive(seed + 1, task)
        assert marker.exists()  # so the work was killed in the middle of the first merge
        yield one
    finally:
        if one.process is not None and one.process.poll() is None:
            one.process.kill()
            one.process.wait(30)
        cluster.stop()


def under_load(service: OnRay, during: Callable[[Load], None]) -> list[Asked]:
    """What eight clients were answered while something was done."""

    async def main() -> Load:
        async with Load(service.asked) as load:
            await load.more()
            await asyncio.to_thread(during, load)
            await load.more(20)
        return load

    return asyncio.run(main()).asked


def failed(asked: list[Asked]) -> list[Asked]:
    return [one for one in asked if one.status != 200]


def test_work_that_was_killed_ends_with_the_bytes_of_a_replay(on_ray: OnRay, tmp_path: Path) -> None:
    assert verify(on_ray.out) == []
    again = replay(on_ray.out, tmp_path / "again")
    assert again.served.sha256 == on_ray.roll_back(2)


def test_rollbacks_under_load_fail_nothing_and_replace_no_process(on_ray: OnRay) -> None:
    first = {t: on_ray.roll_back(t) for t in (0, 1, 2)}
    replicas = sorted(one.pid for one in on_ray.processes("ray::ServeReplica:zoo"))
    memory = sum(one.memory_info().rss for one in on_ray.processes("ray::ServeReplica:zoo"))
    seconds = []

    def swap(_: Load) -> None:
        for t in islice(cycle((0, 1, 2)), SWAPS):
            began = time.monotonic()
            assert on_ray.roll_back(t) == first[t]
            seconds.append(time.monotonic() - began)

    asked = under_load(on_ray, swap)
    times = sorted(one.ended - one.began for one in asked)
    grown = sum(one.memory_info().rss for one in on_ray.processes("ray::ServeReplica:zoo")) / memory
    print(
        f"{len(asked)} requests, {len(failed(asked))} failed; median {times[len(times) // 2]:.3f} s, p99 "
        f"{times[len(times) * 99 // 100]:.3f} s, longest {times[-1]:.3f} s; a rollback until both replicas serve it "
        f"{sorted(seconds)[SWAPS // 2]:.2f} s; memory {grown:.3f} times"
    )
    assert failed(asked) == []
    assert {one.sha256 for one in asked} == set(first.values())
    assert sorted(one.pid for one in on_ray.processes("ray::ServeReplica:zoo")) == replicas
    assert grown <= 1.15


def test_weights_that_cannot_load_change_nothing(on_ray: OnRay) -> None:
    served = on_ray.roll_back(2)
    service, good = on_ray.asked, on_ray.asked.head.current()
    assert good is not None
    broken = on_ray.out.parent / "broken.safetensors"
    broken.write_bytes(good.path.read_bytes()[:5000])

    def problems() -> set[str | None]:
        found = {}
        for _ in range(10):
            body = httpx2.get(f"{service.url}/v1/status", headers=service.headers(), timeout=120).json()
            found[body["process"]] = body["serving"]["problem"]
        return set(found.values()) if len(found) == 2 else set()

    def damage(_: Load) -> None:
        service.head.write(Served(9, "a-000009", sha256_of(broken), broken, good.seq + 1), [good])
        until(lambda: problems() == {"weights.damaged"}, PATIENCE)

    asked = under_load(on_ray, damage)
    service.head.write(good)
    until(lambda: problems() == {None}, PATIENCE)
    assert failed(asked) == [] and {one.sha256 for one in asked} == {served}


def test_what_is_killed_comes_back_and_the_log_is_the_same(on_ray: OnRay) -> None:
    served, log = on_ray.roll_back(1), sorted((on_ray.out / "service/zoo/log").glob("*.json"))
    lost = {}
    for title in ("ray::ServeReplica:zoo", "ray::ServeController", "ray::ProxyActor", "ray::_Working"):
        (killed, *_) = on_ray.processes(title)

        def kill(load: Load, killed: psutil.Process = killed, title: str = title) -> None:
            killed.kill()
            until(lambda: any(one.pid != killed.pid for one in on_ray.processes(title)), PATIENCE)
            until(lambda: len(on_ray.asked.served()) == 2, PATIENCE)

        asked = under_load(on_ray, kill)
        answered = sorted(one.ended for one in asked if one.status == 200)
        pause = max(later - earlier for earlier, later in pairwise(answered))
        lost[title] = len(failed(asked))
        print(
            f"{title} killed: {lost[title]} requests of eight clients failed, {pause:.1f} s without an answer"
        )
        assert {one.sha256 for one in asked if one.status == 200} == {served}
    assert lost["ray::_Working"] == 0 and lost["ray::ServeController"] == 0
    assert sorted((on_ray.out / "service/zoo/log").glob("*.json")) == log


def test_lost_command_leaves_answers_going_and_is_given_again(on_ray: OnRay) -> None:
    first = {t: on_ray.roll_back(t) for t in (0, 1, 2)}
    replicas = sorted(one.pid for one in on_ray.processes("ray::ServeReplica:zoo"))

    def again(_: Load) -> None:
        assert on_ray.process is not None
        on_ray.process.kill()
        on_ray.process.wait(30)
        on_ray.start()

    asked = under_load(on_ray, again)
    assert failed(asked) == []
    assert sorted(one.pid for one in on_ray.processes("ray::ServeReplica:zoo")) == replicas
    assert {t: on_ray.roll_back(t) for t in (0, 1, 2)} == first
    on_ray.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
    assert on_ray.process.wait(PATIENCE) == 0, on_ray.log.read_text()  # type: ignore[union-attr]
    assert on_ray.processes("ray::ServeReplica:zoo") == [] and on_ray.processes("ray::_Working") == []
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"{on_ray.asked.url}/healthz", timeout=60)
