"""The network between two hosts is cut while both train, and restored: two Ray nodes in separate namespaces."""

import hashlib
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.run.trace import read_timeline
from tests.cluster.nodes import DASHBOARD, NEEDS, WORKER, possible, two_nodes
from tests.faults.harness import created, leftovers, tracked, wait_until
from tests.world import STRATEGIES, World, artifacts, command

HEALTH = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.fault("F8")
@pytest.mark.timeout(600)
@pytest.mark.skipif(not possible(), reason=NEEDS)
@pytest.mark.parametrize("seconds", [10, 60])
def test_study_over_two_hosts_survives_a_cut_between_them(
    seconds: int, world: World, tmp_path: Path, record_property: Any
) -> None:
    study = world.study(grid={"strategies": STRATEGIES, "seed": [0, 1]})
    out, local = tmp_path / "shared" / "out", tmp_path / "local"
    with two_nodes(tmp_path, HEALTH) as nodes:
        client = nodes.client(
            "submit", study, "--address", DASHBOARD, "--out", out, "--json",
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        wait_until(lambda: _trained_on(out, WORKER), "no expert on the far node")
        nodes.link(up=False)
        began, done = time.monotonic(), len(created(out))
        wait_until(lambda: len(created(out)) > done + 2, "the near node does not go on")
        record_property("near node goes on after", f"{time.monotonic() - began:.0f} s")
        time.sleep(max(0.0, seconds - (time.monotonic() - began)))
        nodes.link(up=True)
        said, errors = client.communicate(timeout=300)
        assert client.returncode == 0, said + errors
        assert json.loads(said)["exit_code"] == 0
    answer = command("run", study, "--out", local, "--address", "local")
    assert answer.returncode == 0, answer.stderr
    assert artifacts(out) == artifacts(local)
    assert tracked(out) == tracked(local)
    assert command("verify", out).returncode == 0
    assert [path for path in leftovers(out) if not _of_far_node(path)] == []
    assert len(leftovers(out)) <= 1, "the far node has one CPU, so it can have lost one stage at most"


def _trained_on(out: Path, node: str) -> bool:
    if not (out / "timeline.jsonl").exists():
        return False
    return any(row.get("kind") == "train" and row["node"].startswith(node) for row in read_timeline(out))


def _of_far_node(path: str) -> bool:
    """Whether this is a stage of the far node, which is kept for a week: no process here can tell whether its writer is alive."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    host = "\n".join(["node-work", boot, str(Path("/proc/self/ns/pid").readlink())])
    mark = path.rsplit(".", 2)[-2] if path.startswith("store/.stage/") else ""
    return mark.startswith(hashlib.sha256(host.encode()).hexdigest()[:12] + "-")
