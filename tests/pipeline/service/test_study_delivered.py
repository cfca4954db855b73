"""A study on a real cluster delivers its experts to a real service, by the command line and from Python."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from merge_service.checkpoints import WEIGHTS_FILE
from tests.pipeline.service.outside import until
from tests.pipeline.service.test_together import started
from tests.servers import free_port
from tests.world import ROOT, Cluster, World

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]
PYTHON = """
import sys
import temporal_merge as tm
study, out, address, url, token = sys.argv[1:]
with tm.Service(url, token) as service:
    tm.run(tm.load_study(study), out, address, deliver=tm.Delivery(service, {"license": "MIT"}))
"""


def test_experts_of_a_study_become_the_model_that_is_served(
    world: World, cluster: Cluster, tmp_path: Path
) -> None:
    model: dict[str, Any] = {"config": str(world.home / "model.json"), "pretrained": None}
    study = world.study(
        model=model, stream={"tasks": ["red", "green"]}, grid={"strategies": ["offline_merging"]}
    )
    config = tmp_path / "service.yaml"
    tree = {
        "name": "zoo",
        "model": model,
        "strategy": "offline_merging",
        "tasks": {"open": False, "list": ["red", "green"]},
        "gates": {"solo": {"required": False}, "geometry": {"reference": {"norm": 1.0}, "low": 1e-4, "high": 1e4}},
        "serving": {"workers": 1},
        "listen": {"port": free_port()},
    }  # fmt: skip
    config.write_text(yaml.safe_dump(tree))
    with started(config, tmp_path) as service:
        until(lambda: service.process.poll() is not None or service.serves(0), 600)
        token, out = service.key["authorization"].removeprefix("Bearer "), tmp_path / "run"
        asked = [
            "--out",
            str(out),
            "--address",
            cluster.address,
            "--deliver",
            service.url,
            "--license",
            "MIT",
        ]
        ran = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", "run", str(study), *asked],
            cwd=ROOT, env={**os.environ, "TEMPORAL_MERGE_TOKEN": token}, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert ran.returncode == 0 and "the service has all 2 experts" in ran.stderr, ran.stderr
        until(lambda: service.serves(2), 600)
        (last,) = [
            record
            for file in (out / "store/merge").glob("*/record.json")
            if (record := json.loads(file.read_text())) and file.parent.name.startswith("t2")
        ]
        assert service.ask().headers["x-model-sha256"] == last["files"][WEIGHTS_FILE]["sha256"]
        again = subprocess.run(
            [sys.executable, "-c", PYTHON, str(study), str(out), cluster.address, service.url, token],
            cwd=ROOT, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert again.returncode == 0 and "the service has all 2 experts" in again.stderr, again.stderr
        found = httpx2.get(f"{service.url}/v1/arrivals", headers=service.key, timeout=60).json()["arrivals"]
        assert [(one["task"], one["status"]) for one in found] == [
            ("red", "superseded"),
            ("green", "promoted"),
        ]
