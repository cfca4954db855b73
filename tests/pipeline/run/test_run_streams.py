"""A run over streams of classes and two models: experts learn what the streams state, and saved streams are equivalent."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.study.streams import load
from pipeline.workspace.opening import open_plan
from tests.world import TASKS, Cluster, World, command

pytestmark = pytest.mark.ray

RANDOM = {"order": "random", "chunks": 2, "tasks": list(TASKS)}
NEAREST = {"order": "similarity", "chunks": 3, "tasks": list(TASKS)}


def study(world: World, streams: list[Any], models: int = 1) -> Path:
    path = str(world.home / "model.json")
    return world.study(
        name="classes",
        data={"root": str(world.home / "data"), "pretraining": ["grey"], "adaptation": list(TASKS),
              "held_out": ["grey"], "cache": str(world.home / "cache")},
        grid={
            "strategies": ["best_in_time"],
            "stream": streams,
            "model": [{"config": path, "seed": seed} for seed in range(models)],
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def out(world: World, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("streams") / "out"
    answer = command(
        "run", study(world, [RANDOM, NEAREST], models=2), "--out", place, "--address", cluster.address
    )
    assert answer.returncode == 0, answer.stderr
    return place


def test_every_model_learns_every_stream_from_its_own_base(out: Path) -> None:
    found = json.loads((out / "results.json").read_text())["trajectories"]
    assert [len(one["steps"]) for one in found] == [3, 4, 3, 4]
    firsts = {one["steps"][0]["deployed_sha256"] for one in found}
    assert len(firsts) == 2 == len(list((out / "store" / "base").iterdir()))
    assert len({step["expert_sha256"] for one in found for step in one["steps"][1:]}) == 10
    for one in found:
        assert all(step["expert_own_score"] is None for step in one["steps"] if "classes" in step["task"])
        assert all(set(step["scores"]) == {*TASKS, "grey"} for step in one["steps"])


def test_streams_lie_in_out_and_mean_the_same_when_given_back(
    out: Path, world: World, cli: Any, tmp_path: Path
) -> None:
    saved = {len(load(path).tasks): path for path in (out / "streams").iterdir()}
    assert sorted(saved) == [2, 3]
    for path in saved.values():
        assert sum(len(part.classes or "123") for task in load(path).tasks for part in task.parts) == 9
    assert cli("plan", study(world, [RANDOM]), "--save-streams", tmp_path).code == 0
    assert (tmp_path / saved[2].name).read_bytes() == saved[2].read_bytes()
    said = cli("plan", study(world, [{"file": str(saved[3])}]), "--out", out, "--json")
    counts = json.loads(said.out)["steps"]
    assert counts["train"] == {"unique": 3, "naive": 3, "cached": 3}
    assert all(of["cached"] == of["unique"] for of in counts.values())


def test_record_of_an_expert_names_its_classes_by_a_digest_that_the_plan_resolves(out: Path) -> None:
    classes = open_plan(out).classes
    named = set()
    for path in (out / "store" / "train").glob("*/record.json"):
        for source in json.loads(path.read_text())["spec"]["update"]:
            if source["classes"] is not None:
                named.add(source["classes"])
                assert set(classes[source["classes"]]) < {"dark", "middle", "light"}
    assert named


def test_tracker_has_a_base_of_each_model(out: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    (experiment,) = [one for one in client.search_experiments() if one.name == "temporal-merge"]
    models = client.search_logged_models([experiment.experiment_id], max_results=100)
    assert sum(model.name.startswith("base-classes") for model in models) == 2
