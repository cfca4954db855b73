"""A study whose experts are trained by two ranks each, and one that requires more than the cluster has."""

import json
from pathlib import Path

import pytest

from pipeline.run.trace import read_timeline
from tests.world import Cluster, World, command


@pytest.mark.ray
@pytest.mark.slow
def test_study_trains_each_expert_on_two_ranks_with_zero_one(
    world: World, cluster: Cluster, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    strategies = [{"init": "base", "deploy": "all", "technique": "average"}, "continual_finetuning"]
    experts = {"workers": 2, "zero_stage": 1, "checkpoint_every": 2}
    study = world.study(resources={"experts": experts}, grid={"strategies": strategies})
    answer = command("run", study, "--out", out, "--address", cluster.address)
    assert answer.returncode == 0, answer.stderr
    records = [json.loads(path.read_text()) for path in out.glob("store/train/*/record.json")]
    plan = json.loads((out / "plan.json").read_text())
    assert len(records) == sum(step["kind"] == "train" for step in plan["steps"]) > 3
    for record in records:
        engine = record["spec"]["engine"]
        assert (engine["kind"], engine["world"], engine["zero_stage"]) == ("deepspeed", 2, 1)
        assert record["result"]["steps"] == 6 and record["result"]["task_vector_norm"] > 0
    assert json.loads((out / "results.json").read_text())["complete"]


@pytest.mark.fault("F6")
@pytest.mark.ray
def test_request_that_no_node_can_place_ends_the_run_at_once(
    world: World, cluster: Cluster, tmp_path: Path
) -> None:
    study = world.study(resources={"experts": {"workers": 3}})
    answer = command("run", study, "--out", tmp_path / "out", "--address", cluster.address)
    assert answer.returncode == 2, answer.stderr
    outlook, *problem = answer.stderr.splitlines()
    assert outlook.startswith("tiny: ") and len(problem) == 1
    assert "do not fit into 2 CPUs" in problem[0]
    assert not [row for row in read_timeline(tmp_path / "out") if row.get("kind") == "train"]
