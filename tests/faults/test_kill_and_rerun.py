"""SIGKILL at named points, then the same command again: the same bytes and metrics, and no step repeated."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking.mlflow.export import export
from tests.faults.harness import Faults, created, run
from tests.world import Cluster, World, artifacts, command

DRIVER_DEATHS = {
    "training": "train.after_ckpt",
    "before an expert is committed": "store.before_record",
    "merging": "merge.before_commit",
    "evaluating": "evaluate.start",
    "between steps": "driver.after_commit",
}


SCORES = {"ka", "zs", "gm", "forgetting", "backward_transfer", "loss", "merged_norm", "cosine_with_expert"}


def exported(out: Path) -> list[dict]:
    """The content of MLflow for a run, without times and durations, which may differ between two runs."""
    return export(f"sqlite:///{out / 'mlflow.db'}", "temporal-merge")


def measurements(out: Path) -> str:
    """Every score in MLflow by run, metric and step."""
    kept = [
        (entry.get("run") or entry["model"], *metric)
        for entry in exported(out)
        for metric in entry.get("metrics", ())
        if metric[0] in SCORES or metric[0].startswith("score")
    ]
    return json.dumps(kept)


@pytest.mark.fault("F2", "F4")
@pytest.mark.ray
@pytest.mark.slow
def test_driver_killed_at_five_moments_and_rerun_gives_the_same_bytes_and_metrics(
    world: World, cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done_before: dict[str, int] = {}
    for moment, point in DRIVER_DEATHS.items():
        marker = tmp_path / point
        fault = {point: {"marker": str(marker), "pid_file": str(out / "driver.json")}}
        answer = command("run", world.study(), "--out", out, "--address", cluster.address, faults=fault)
        assert marker.exists(), f"{moment}: the fault was never placed: {answer.stderr}"
        assert answer.returncode == -9, f"{moment}: {answer.returncode} {answer.stderr}"
        now = created(out)
        assert done_before.items() <= now.items(), f"{moment}: a finished step was done again"
        done_before = now
    answer = command("run", world.study(), "--out", out, "--address", cluster.address)
    assert answer.returncode == 0, answer.stderr
    assert done_before.items() <= created(out).items()
    assert artifacts(out) == artifacts(undisturbed)
    assert measurements(out) == measurements(undisturbed)
    assert command("verify", out).returncode == 0
    assert not list((out / "store" / ".stage").iterdir())


@pytest.mark.fault("F1", "F3")
@pytest.mark.ray
@pytest.mark.slow
def test_actors_killed_at_three_points_are_replaced_within_the_run(
    world: World, cluster: Cluster, undisturbed: Path, tmp_path: Path, record_property: Any
) -> None:
    out, faults = tmp_path / "out", Faults(tmp_path)
    for point in ("train.after_ckpt", "merge.before_commit", "evaluate.start"):
        faults.at(point)
    answer = run(world.study(), out, cluster, faults)
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr.count("trying again") >= len(faults.markers)
    assert artifacts(out) == artifacts(undisturbed)
    record_property("cases", len(faults.markers))
