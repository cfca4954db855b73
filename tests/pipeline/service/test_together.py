"""One command serves and works: an expert arrives beside, and what is answered is by the weights that it led to."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import yaml

from merge_service.checkpoints import WEIGHTS_FILE, Checkpoint
from tests.merge_service.toys import save
from tests.pipeline.service.outside import until
from tests.servers import free_port
from tests.serving_toys import LABELS, picture
from tests.world import ROOT

TINY = ROOT / "configs/models/tiny-clip"
COMMAND = (sys.executable, "-m", "pipeline.cli")


@dataclass
class Service:
    out: Path
    url: str
    process: subprocess.Popen[bytes]

    @property
    def key(self) -> dict[str, str]:
        token = (self.out / "service/zoo/door/service.token").read_text().strip()
        return {"authorization": f"Bearer {token}"}

    def ask(self) -> httpx2.Response:
        """A vector of a text, with the headers that name its model."""
        body = {"texts": ["a cat"]}
        return httpx2.post(f"{self.url}/v1/embed/text", json=body, headers=self.key, timeout=60)

    def serves(self, t: int) -> bool:
        try:
            return self.ask().headers.get("x-model-t") == str(t)
        except (httpx2.TransportError, FileNotFoundError):
            return False


@pytest.fixture
def config(tmp_path: Path) -> Path:
    tree = {
        "name": "zoo",
        "model": {"config": "tiny-clip", "pretrained": str(TINY)},
        "strategy": "offline_merging",
        "tasks": {"open": True, "list": ["letters", "scripts"]},
        "gates": {"solo": {"required": False}, "geometry": {"reference": {"norm": 1.0}, "low": 0.001, "high": 1000}},
        "serving": {"workers": 1},
        "listen": {"port": free_port()},
    }  # fmt: skip
    file = tmp_path / "service.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


@contextlib.contextmanager
def started(config: Path, tmp_path: Path) -> Iterator[Service]:
    """`temporal-merge serve` on a configuration; killed with all that it started at the end."""
    out, port = tmp_path / "zoo", yaml.safe_load(config.read_text())["listen"]["port"]
    with (tmp_path / "service.log").open("wb") as log:
        process = subprocess.Popen(
            [*COMMAND, "serve", str(config), "--out", str(out)], stdout=log, stderr=log, cwd=ROOT, start_new_session=True
        )  # fmt: skip
        try:
            yield Service(out, f"http://127.0.0.1:{port}", process)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


@pytest.fixture
def service(config: Path, tmp_path: Path) -> Iterator[Service]:
    with started(config, tmp_path) as one:
        yield one


def expert(place: Path, seed: int, turned: float = 1.0) -> Path:
    """An expert a little away from the base; its projection of texts is `turned` times the base's."""
    rng = np.random.default_rng(seed)
    with Checkpoint.open(TINY) as base:
        moved = {
            name: base.read(name).reshape(info.shape)
            + rng.standard_normal(info.shape).astype(np.float32) * np.float32(0.01)
            for name, info in base.tensors.items()
        }
    moved["text_projection"] *= np.float32(turned)
    return save(place / f"{seed}.safetensors", moved)


def test_expert_that_arrives_beside_is_served_without_a_restart(service: Service, tmp_path: Path) -> None:
    until(lambda: service.process.poll() is not None or service.serves(0))
    assert service.process.poll() is None, (tmp_path / "service.log").read_text()
    before = service.ask().headers["x-model-sha256"]
    came = subprocess.run(
        [*COMMAND, "service", "arrive", str(expert(tmp_path, 1)), "--task", "letters", "--out", str(service.out)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert came.returncode == 0 and "promoted, t = 1" in came.stdout, came.stdout + came.stderr
    until(lambda: service.serves(1))
    answer = service.ask()
    assert answer.headers["x-arrival"].startswith("a-") and answer.headers["x-model-sha256"] != before
    (merged,) = (service.out / "store").glob(f"sequence/*/{WEIGHTS_FILE}")
    manifest = httpx2.get(f"{service.url}/v1/models/champion", headers=service.key, timeout=60)
    assert manifest.json()["sha256"] == answer.headers["x-model-sha256"] and merged.is_file()
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(60) == 0


def arrives(service: Service, file: Path, task: str) -> str:
    """Send an expert by the command line; the id of its arrival."""
    environment = {
        **os.environ, "TEMPORAL_MERGE_URL": service.url,
        "TEMPORAL_MERGE_TOKEN": service.key["authorization"].removeprefix("Bearer "),
    }  # fmt: skip
    came = subprocess.run(
        [*COMMAND, "arrive", str(file), "--task", task, "--json"],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=240,
    )  # fmt: skip
    return str(json.loads(came.stdout)["id"])


def tried(service: Service, client: httpx2.Client, arrival: str) -> tuple[set[str], dict[str, Any]]:
    """Ask what pictures show until the trial of an arrival has ended: the models that answered in it, and the arrival."""

    def shown() -> dict[str, Any]:
        return dict(client.get(f"/v1/arrivals/{arrival}").raise_for_status().json())

    until(lambda: shown()["status"] == "canary")
    answered = set[str]()
    for number in range(10_000):
        answer = client.post(
            "/v1/classify",
            params={"labels": LABELS},
            content=picture(number % 4),
            headers={"content-type": "image/png", "x-request-id": f"request {number}"},
        )
        assert answer.status_code == 200
        found = shown() if number % 10 == 0 else {"status": "canary"}
        if found["status"] != "canary":
            until(lambda: shown()["status"] != "evaluated")
            return answered, shown()
        answered.add(answer.headers["x-model-sha256"])
    raise AssertionError("the trial did not end")


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_candidate_answers_its_share_and_what_it_answered_decides(config: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(config.read_text())
    tree["promotion"] = {"canary": {"share": 0.5, "requests": 20, "deadline": "1h"}}
    tree["gates"]["canary"] = {"failed": 0.2, "agreement": 0.5, "slower": 1000}
    config.write_text(yaml.safe_dump(tree))
    with started(config, tmp_path) as service:
        until(lambda: service.process.poll() is not None or service.serves(0))
        with httpx2.Client(base_url=service.url, headers=service.key, timeout=60) as client:

            def served() -> str:
                return str(service.ask().headers["x-model-sha256"])

            base = served()
            answered, like = tried(service, client, arrives(service, expert(tmp_path, 1), "letters"))
            assert like["status"] == "promoted" and base in answered and len(answered) == 2
            first = (answered - {base}).pop()
            until(
                lambda: {served() for _ in range(10)} == {first}
            )  # each worker exchanges its weights by itself
            turned = expert(tmp_path, 2, turned=-9.0)  # each picture shows what it showed least
            answered, unlike = tried(service, client, arrives(service, turned, "scripts"))
            assert (unlike["status"], unlike["reasons"]) == ("rejected", ["canary.agreement"])
            assert first in answered and len(answered) == 2
            until(lambda: {served() for _ in range(10)} == {first})
