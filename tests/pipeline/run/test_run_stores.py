"""A run with its store elsewhere, or shared with another run at the same time: the same bytes as with a store of its own."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.run.trace import read_timeline
from pipeline.store.lease import Files
from pipeline.store.remote import MIRROR
from pipeline.workspace.opening import open_plan
from tests.pipeline.s3_server import s3_server
from tests.world import TASKS, Cluster, World, command, start

pytestmark = pytest.mark.ray


def checkpoints(out: Path) -> dict[str, Any]:
    """Scores and digests of every trajectory at every t, without durations."""
    found = json.loads((out / "results.json").read_text())["trajectories"]
    return {
        one["id"]: [
            {key: value for key, value in step.items() if "seconds" not in key} for step in one["steps"]
        ]
        for one in found
    }


def test_run_on_s3_gives_the_checkpoints_of_a_local_run_and_a_second_study_reuses_its_experts(
    undisturbed: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MIRROR, str(tmp_path / "mirror"))
    out, again = tmp_path / "out", tmp_path / "again"
    with s3_server(tmp_path):
        where = ("--set", "storage.store=s3://bucket/shared")
        warm = Cluster(tmp_path)  # its workers must have the server's address in their environment
        try:
            answer = command("run", world.study(), "--out", out, "--address", warm.address, *where)
            assert answer.returncode == 0, answer.stderr
            assert checkpoints(out) == checkpoints(undisturbed)
            assert not (out / "store").exists()
            verified = command("verify", out)
            assert verified.returncode == 0, verified.stdout
            assert '"done"' in command("status", out, "--json").stdout
            assert list((out / "mlartifacts").rglob("*.safetensors")), (
                "weights were not handed to the tracker"
            )
            average = {"init": "base", "deploy": "all", "technique": "average"}
            more = world.study(name="more", grid={"strategies": ["best_in_time", average]})
            said = json.loads(command("plan", more, "--out", again, "--json", *where).stdout)
            assert said["steps"]["train"]["cached"] == said["steps"]["train"]["unique"] >= len(TASKS)
        finally:
            warm.stop()
    assert "AWS_ENDPOINT_URL" not in os.environ


def test_two_studies_at_once_on_one_store_do_no_step_twice_and_get_the_same_checkpoints(
    undisturbed: Path, world: World, cluster: Cluster, tmp_path: Path
) -> None:
    where = ("--set", f"storage.store={tmp_path / 'store'}", "--address", cluster.address)
    outs = [tmp_path / name for name in ("one", "two")]
    runs = [start("run", world.study(name=out.name), "--out", out, *where) for out in outs]
    said = [(run.communicate(timeout=240)[1], run.returncode) for run in runs]
    assert [code for _, code in said] == [0, 0], said
    rows = [[row["fingerprint"] for row in read_timeline(out) if "fingerprint" in row] for out in outs]
    assert not set(rows[0]) & set(rows[1])
    assert {one for some in rows for one in some} == set(open_plan(outs[0]).steps)
    assert checkpoints(outs[0]) == checkpoints(outs[1]) == checkpoints(undisturbed)
    assert Files(tmp_path / "store").sizes(".leases") == {}
