"""The projection of a study: its rows, which depend on plan and records only."""

import math
import posixpath
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking.outbox import Row
from pipeline.tracking.rows.names import SHOWN, flat, metric_name, plain
from pipeline.tracking.rows.rows import Metrics
from tests.pipeline.tracked_study import START_MS, Tracked, finished_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    return finished_study(tmp_path_factory.mktemp("study"), seeds=(0, 1))


def rows_of(study: Tracked, order: list[str] | None = None) -> dict[str, Row]:
    projection = study.projection()
    rows = projection.started(START_MS)
    for fingerprint in order or study.plan.steps:
        rows += projection.step(study.plan.steps[fingerprint], study.records[fingerprint])
    return {row.key.split("/", 1)[1]: row for row in [*rows, *projection.finished("a,b\n")]}


def unnumbered(name: str) -> str:
    """A name without the number that begins it where names are alike."""
    return re.sub(r"^\d+( · |-)", "", name)


def of(rows: dict[str, Row], op: str) -> list[dict[str, Any]]:
    return [dict(row.payload) for row in rows.values() if row.payload["op"] == op]


@pytest.mark.fault("F20")
def test_rows_do_not_depend_on_the_order_steps_finished_in(study: Tracked) -> None:
    expected = rows_of(study)
    for seed in range(5):
        assert rows_of(study, any_order(study, seed)) == expected


def any_order(study: Tracked, seed: int) -> list[str]:
    """An order in which workers could have finished the steps."""
    draw, done, waiting = random.Random(seed), [], dict(study.plan.steps)
    while waiting:
        ready = [f for f, step in waiting.items() if not set(step.inputs.values()) & waiting.keys()]
        done.append(draw.choice(ready))
        del waiting[done[-1]]
    return done


@pytest.mark.fault("F11")
def test_a_step_told_twice_makes_the_same_rows(study: Tracked) -> None:
    projection = study.projection()
    for fingerprint, step in study.plan.steps.items():
        projection.step(step, study.records[fingerprint])
    again = {
        row.key: row for f, s in study.plan.steps.items() for row in projection.step(s, study.records[f])
    }
    expected = {row.key: row for row in rows_of(study).values()}
    assert again.items() <= expected.items()


@pytest.mark.fault("F32")
def test_measurements_have_the_time_of_their_records(study: Tracked) -> None:
    times = {record.created_ms for record in study.records.values()}
    metrics = [metric for body in of(rows_of(study), "log") for metric in body["metrics"]]
    stamps = {
        stamp for name, _, _, stamp, _, _ in metrics if not name.startswith("system/")
    }  # these have their own
    assert stamps and stamps <= times


def test_runs_are_nested_and_named_for_people(study: Tracked) -> None:
    runs = of(rows_of(study), "run")
    names = {unnumbered(body["name"]): body["parent"] for body in runs}
    assert names["demo"] is None
    assert names["best_in_time · seed 0"] == names["zero_shot · seed 1"] == "study"
    experts = next(body for body in runs if body["run"] == "experts")
    assert experts["parent"] == "study" and experts["name"] == f"experts ({len(runs) - 10})"
    assert names["expert t=3 photos_b · init ema · average · seed 0"] == "experts"
    assert len(names) == len(runs), "two runs of one name"


def test_experts_with_replay_and_of_a_recipe_grid_are_told_apart(tmp_path: Path) -> None:
    study = finished_study(
        tmp_path,
        strategies=("continual_finetuning", "continual_finetuning_replay"),
        tasks=("animals", "scripts"),
        axes={"recipe.lr": [1e-3, 1e-4]},
    )
    names = [unnumbered(b["name"]) for b in of(rows_of(study), "run") if b["tags"]["kind"] == "expert"]
    assert "expert t=2 scripts · init latest · lr 0.001" in names
    assert "expert t=2 scripts · init latest · replay · lr 0.0001" in names
    assert len(names) == len(set(names)) == 8


@pytest.mark.parametrize(
    "axes", [{}, {"budget.multiplier": [1, 2], "recipe.lr": [1e-3, 1e-4]}], ids=["small", "grid"]
)
def test_names_differ_before_the_place_where_tables_cut_them(tmp_path: Path, axes: dict[str, Any]) -> None:
    study = finished_study(
        tmp_path,
        strategies=("best_in_time", {"init": "base", "deploy": ["all", "ema"], "technique": ["ties", "breadcrumbs_ties"]}),
        axes=axes,
    )  # fmt: skip
    rows = rows_of(study)
    names = [[body["name"] for body in of(rows, "run")], [body["name"] for body in of(rows, "model")]]
    for shown in ([name[:SHOWN] for name in of_one] for of_one in names):
        assert len(set(shown)) == len(shown)
    assert not axes or any("· x2" in name for name in names[0]), "a budget is said in words"


def test_names_of_a_small_study_carry_no_number(tmp_path: Path) -> None:
    study = finished_study(tmp_path, strategies=("zero_shot", "best_in_time"))
    names = {body["name"] for op in ("run", "model") for body in of(rows_of(study), op)}
    assert {"best_in_time", "best_in_time-t3-photos_b", "expert-t3-photos_b-init_ema-average"} <= names


def test_study_shows_what_its_best_trajectory_has_reached(study: Tracked) -> None:
    projection, best = study.projection(), study.plan.trajectories[-1]
    for fingerprint, step in study.plan.steps.items():
        projection.step(step, study.records[fingerprint])
    (body,) = [
        row.payload for row in projection.finished(None, best.id) if row.key.endswith("log/study/best")
    ]
    own = [
        row.payload for row in rows_of(study).values() if row.payload.get("run") == f"trajectory/{best.id}"
    ]
    wanted = [
        [name, value, step]
        for row in own if row["op"] == "log"
        for name, value, step, *_ in row["metrics"] if name in ("ka", "zs", "gm") and step > 0
    ]  # fmt: skip
    shown = [metric[:3] for metric in body["metrics"]]
    assert len(wanted) == 9 and all(metric in shown for metric in wanted)
    assert {name for name, *_ in shown} - {"ka", "zs", "gm", "zs_replayed", "zs_never_replayed"} <= {
        f"score/{one}" for one in (*study.plan.adaptation, *study.plan.held_out)
    }
    assert body["tags"]["best.trajectory"].endswith("best_in_time · seed 1")
    assert "models:/demo@best" in body["tags"]["mlflow.note.content"]


def test_expert_has_the_machines_use_at_its_own_times(study: Tracked) -> None:
    fingerprint, record = next((f, r) for f, r in study.records.items() if r.kind == "train")
    seen = {"time_ms": [1000, 2000], "cpu_utilization_percentage": [10.0, 90.0]}
    told = replace(record, result={**record.result, "system": seen})
    rows = study.projection().step(study.plan.steps[fingerprint], told)
    body = next(row.payload for row in rows if row.key.endswith("/training"))
    found = [metric[:4] for metric in body["metrics"] if metric[0].startswith("system/")]
    name = "system/cpu_utilization_percentage"
    assert found == [[name, 10.0, 0, 1000], [name, 90.0, 1, 2000]]


def test_lineage_of_very_many_experts_names_the_newest_and_counts_all(
    study: Tracked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tracking.rows.lineage.LISTED", 2)
    models = {unnumbered(body["name"]): body for body in of(rows_of(study), "model")}
    for strategy in ("best_in_time", "offline_merging"):
        lineage = models[f"t3-photos_b-{strategy}-seed0"]["manifest"]["lineage"]
        assert lineage["experts_total"] == 3
        assert [expert["t"] for expert in lineage["experts"]] == [2, 3]
    tags = models["t3-photos_b-best_in_time-seed0"]["tags"]
    assert tags["lineage.experts"] == "3 experts, see manifest.json"


def test_every_unique_expert_has_one_run(study: Tracked) -> None:
    trained = [step for step in study.plan.steps.values() if step.kind == "train"]
    experts = [body for body in of(rows_of(study), "run") if body["tags"]["kind"] == "expert"]
    assert len(experts) == len(trained) == len({body["tags"]["fingerprint"] for body in experts})


def test_served_checkpoints_are_models_with_lineage_and_the_base_is_one(study: Tracked) -> None:
    models = {unnumbered(body["name"]): body for body in of(rows_of(study), "model")}
    assert [name for name in models if "zero_shot" in name] == []
    assert models["base-demo"]["type"] == "base"
    model = models["t3-photos_b-best_in_time-seed0"]
    assert (
        model["params"] | {"strategy.init": "ema", "t": "3", "task": "photos_b", "seed": "0"}
        == model["params"]
    )
    assert [expert["t"] for expert in model["manifest"]["lineage"]["experts"]] == [1, 2, 3]
    assert model["manifest"]["lineage"]["experts_total"] == 3
    assert model["tags"]["sha256"] == model["manifest"]["files"]["open_clip_model.safetensors"]["sha256"]
    assert model["tags"]["lineage.base"] == study.base.sha256("open_clip_model.safetensors")
    assert models["t2-scripts-continual_finetuning-seed1"]["type"] == "expert"
    experts = [step for step in study.plan.steps.values() if step.kind == "train"]
    assert len(models) == 1 + 3 * 3 * 2 + len(experts)


def test_every_point_has_its_metrics_at_step_t(study: Tracked) -> None:
    rows = rows_of(study)
    trajectory = next(t for t in study.plan.trajectories if t.name == "best_in_time" and t.seed == 0)
    found: dict[str, set[int]] = {}
    for key, row in rows.items():
        if key.startswith(f"log/trajectory/{trajectory.id}/"):
            for name, _, step, *_ in row.payload["metrics"]:
                found.setdefault(name, set()).add(step)
    everywhere, merged = {0, 1, 2, 3}, {1, 2, 3}
    assert all(found[name] == everywhere for name in ("ka", "zs", "gm", "score/photos_b", "score/icons"))
    assert all(found[name] == merged for name in ("merge_seconds", "merged_norm", "cosine_with_expert"))
    assert found["forgetting"] == found["backward_transfer"] == {2, 3}


def test_every_expert_has_its_own_score_and_the_bases(study: Tracked) -> None:
    found: dict[str, set[str]] = {}
    for body in of(rows_of(study), "log"):
        if body["run"].startswith("expert/"):
            found.setdefault(body["run"], set()).update(metric[0] for metric in body["metrics"])
    wanted = {"own_task_score", "base_own_task_score", "loss", "steps", "samples", "train_seconds"}
    assert found and all(wanted <= names for names in found.values())


def test_value_that_is_not_finite_becomes_a_tag_not_a_metric(study: Tracked) -> None:
    fingerprint, record = next((f, r) for f, r in study.records.items() if r.kind == "train")
    broken = replace(record, result={**record.result, "loss": [[2, 1.0], [4, math.nan], [6, math.inf]]})
    rows = study.projection().step(study.plan.steps[fingerprint], broken)
    body = next(row.payload for row in rows if row.key.endswith("/training"))
    assert [metric[2] for metric in body["metrics"] if metric[0] == "loss"] == [2]
    assert body["tags"]["not_finite"] == "loss at step 4, loss at step 6"


def test_failed_step_marks_its_expert_its_trajectories_and_the_study(study: Tracked) -> None:
    step = next(s for s in study.plan.steps.values() if s.kind == "train" and s.t == 2)
    rows = study.projection().failed(step, "loss is NaN", 5)
    failed = {row.payload["run"].split("/")[0] for row in rows if row.payload["op"] == "status"}
    assert failed == {"study", "experts", "expert", "trajectory"}
    assert {row.payload["error"] for row in rows if row.payload["op"] == "status"} == {"loss is NaN"}


def test_best_trajectory_that_serves_the_base_registers_the_base(study: Tracked) -> None:
    projection = study.projection()
    best = next(one for one in study.plan.trajectories if one.name == "zero_shot")
    for fingerprint, step in study.plan.steps.items():
        projection.step(step, study.records[fingerprint])
    *_, row, alias = (row.payload for row in projection.finished(None, best.id))
    assert (row["op"], row["name"]) == ("register", "demo")
    assert (alias["op"], alias["name"], alias["alias"], alias["model"]) == (
        "alias",
        "demo",
        "best",
        row["model"],
    )
    assert row["model"] == f"base/{study.base.fingerprint[:16]}" and row["run"] == "study"


def test_without_weights_only_the_manifest_is_sent_and_says_where_they_are(tmp_path: Path) -> None:
    study = finished_study(tmp_path, strategies=("offline_merging",), log_weights=False)
    models = of(rows_of(study), "model")
    assert all(body["files"] == [] for body in models)
    assert all((tmp_path / body["manifest"]["store"]).is_dir() for body in models)


@pytest.mark.parametrize("name", ["../../x", "a/b:c", "q\"uo'te%", "über", "", ".", "a\0b"])
def test_hostile_names_become_plain(name: str) -> None:
    assert set(plain(name)) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_=-")
    metric = metric_name("score", name)
    assert plain(name) and posixpath.normpath(metric) == metric and len(metric) > len("score/")


def test_settings_are_flattened_and_short() -> None:
    assert flat({"a": {"b": 1e-05, "c": None}, "d": (0.9, 1.0), "e": True}) == {
        "a.b": "1e-05",
        "d": "[0.9, 1]",
        "e": "True",
    }


def test_metrics_of_a_dataset_without_digest_name_no_dataset() -> None:
    metrics = Metrics(7)
    metrics.add("score/x", 0.5, 1, "x", None)
    metrics.add("gone", None, 1)
    assert metrics.values == [["score/x", 0.5, 1, 7, None, None]] and metrics.tags() == {}
