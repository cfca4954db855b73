"""A whole run with its store elsewhere: the same bytes as with a store of its own."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from s3_server import s3_server

from pipeline.store_remote import MIRROR
from tests.world import TASKS, Cluster, World, command

pytestmark = pytest.mark.ray


def checkpoints(out: Path) -> dict[str, Any]:
    """Scores and digests of every trajectory at every t, without what is measured by a clock."""
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
