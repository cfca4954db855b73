"""Results: the arithmetic against numbers computed by hand, and what an unfinished study gives."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from merge_service.checkpoints import WEIGHTS_FILE
from pipeline.errors import CorruptArtifact
from pipeline.plan.steps import Plan
from pipeline.results import over_time as found
from pipeline.store.artifact import Record
from pipeline.store.local import Store
from tests.pipeline.plan_toys import base_of, facts, make_plan, study


class FakeStore:
    """Records by fingerprint; other records do not exist."""

    def __init__(self) -> None:
        self.known: dict[str, Record] = {}
        self.reads = 0

    def tell(
        self,
        kind: str,
        fingerprint: str,
        result: dict[str, Any],
        weights: str | None = None,
        seconds: float = 1.0,
    ) -> None:
        files = {WEIGHTS_FILE: {"sha256": weights, "bytes": 1}} if weights else {}
        self.known[fingerprint] = Record(
            kind, fingerprint, "slug", {}, {}, {}, files, result, 0, seconds, {}, Path("nowhere")
        )

    def record(self, kind: str, fingerprint: str) -> Record | None:
        self.reads += 1
        return self.known.get(fingerprint)


SCORES = [
    {"d1": 0.1, "d2": 0.2, "kept": 0.8},
    {"d1": 0.9, "d2": 0.3, "kept": 0.7},
    {"d1": 0.5, "d2": 0.7, "kept": 0.6},
]


def seen(rows: list[dict[str, float]], tasks: str = "abc") -> list[Any]:
    return [(SimpleNamespace(t=t, task=tasks[t - 1] if t else "base"), row) for t, row in enumerate(rows)]


def finished(strategies: list[Any], upto: int = 99) -> tuple[Plan, FakeStore]:
    plan, store = make_plan(study(strategies, tasks=2), facts(2)), FakeStore()
    store.tell("base", base_of(plan), {}, "base-sha")
    for fp, step in plan.steps.items():
        if step.t > upto:
            continue
        if step.kind == "train":
            store.tell("train", fp, {"steps": 100}, f"expert-{step.t}")
        elif step.kind == "merge":
            result = {"merge_seconds": 0.25, "merged_norm": 3.0 + step.t, "cosine": 0.5}
            store.tell("merge", fp, result, f"merged-{step.t}", seconds=9.0)
        else:
            scores = SCORES[step.t] if step.slug.startswith("scores") else {step.task: 0.95}
            store.tell("evaluate", fp, {"scores": scores})
    return plan, store


def test_ka_zs_gm_are_unweighted_means_and_their_geometric_mean() -> None:
    scores = {"a": 0.2, "b": 0.4, "c": 0.9}
    assert found.ka(scores, ["a", "b"]) == pytest.approx(0.3)
    assert found.zs(scores, ["c"]) == pytest.approx(0.9)
    assert found.gm(0.3, 0.9) == pytest.approx(math.sqrt(0.27))


def test_mean_over_nothing_or_over_a_missing_score_is_nothing() -> None:
    assert found.ka({"a": 1.0}, []) is None
    assert found.ka({"a": 1.0}, ["a", "b"]) is None
    assert found.gm(None, 0.5) is None
    assert found.gm(0.0, 0.5) == 0.0


def test_published_zero_shot_numbers_combine_as_published() -> None:
    assert found.gm(0.3847, 0.6793) == pytest.approx(0.5112, abs=1e-4)


def test_forgetting_is_the_mean_fall_from_the_best() -> None:
    rows = [
        {"a": 0.99, "b": 0.99, "c": 0.99},
        {"a": 0.8, "b": 0.1, "c": 0.0},
        {"a": 0.9, "b": 0.7, "c": 0.0},
        {"a": 0.5, "b": 0.6, "c": 1.0},
    ]
    assert found.forgetting(seen(rows)) == pytest.approx(((0.9 - 0.5) + (0.7 - 0.6)) / 2)
    assert found.backward_transfer(seen(rows)) == pytest.approx(((0.5 - 0.8) + (0.6 - 0.7)) / 2)


def test_backward_transfer_is_positive_when_later_tasks_help_and_then_nothing_is_forgotten() -> None:
    rows = [{"a": 0.0, "b": 0.0}, {"a": 0.4, "b": 0.0}, {"a": 0.6, "b": 0.5}]
    assert found.forgetting(seen(rows)) == 0.0
    assert found.backward_transfer(seen(rows)) == pytest.approx(0.2)


def test_forgetting_needs_an_earlier_task() -> None:
    rows = [{"a": 0.1, "b": 0.2}, {"a": 0.9, "b": 0.1}]
    for upto in (1, 2):
        assert found.forgetting(seen(rows[:upto])) is None
        assert found.backward_transfer(seen(rows[:upto])) is None


def test_forgetting_averages_the_datasets_of_a_task() -> None:
    rows = [{}, {"x": 1.0, "y": 0.0, "z": 0.0}, {"x": 0.5, "y": 0.1, "z": 1.0}]
    assert found.forgetting(seen(rows), {"a": ["x", "y"], "b": ["z"]}) == pytest.approx(0.5 - 0.3)


def test_results_of_a_finished_study_hold_every_number_at_its_place() -> None:
    plan, store = finished(["best_in_time"])
    answer = found.results(plan, store)
    assert answer["complete"] is True
    (trajectory,) = answer["trajectories"]
    assert (trajectory["id"], trajectory["init"], trajectory["deploy"]) == ("best_in_time", "ema", "ema")
    assert trajectory["params"]["weight"] == 0.5
    assert trajectory["stream"] == ["d1", "d2"]
    base, first, second = trajectory["steps"]
    assert (base["t"], base["expert_sha256"], base["merged_sha256"], base["merge_seconds"]) == (
        0,
        None,
        None,
        None,
    )
    assert base["deployed_sha256"] == "base-sha"
    assert base["ka"] == pytest.approx(0.15)
    assert (first["expert_sha256"], first["merged_sha256"]) == ("expert-1", "merged-1")
    assert (second["merge_seconds"], second["merged_norm"], second["cosine"]) == (0.25, 5.0, 0.5)
    assert second["ka"] == pytest.approx(0.6)
    assert second["gm"] == pytest.approx(math.sqrt(0.6 * 0.6))
    assert second["forgetting"] == pytest.approx(0.4)
    assert second["bwt"] == pytest.approx(-0.4)
    assert second["expert_own_score"] == 0.95
    assert second["scores"] == SCORES[2]


def test_deployed_expert_has_no_merge_and_its_own_score_comes_from_what_was_served() -> None:
    plan, store = finished(["continual_finetuning"])
    last = found.results(plan, store)["trajectories"][0]["steps"][-1]
    assert (last["merged_sha256"], last["merge_seconds"], last["merged_norm"]) == (None, None, None)
    assert last["deployed_sha256"] == last["expert_sha256"] == "expert-2"
    assert last["expert_own_score"] == SCORES[2]["d2"]


def test_zero_shot_repeats_the_base_at_every_t() -> None:
    plan, store = finished(["zero_shot"])
    steps = found.results(plan, store)["trajectories"][0]["steps"]
    assert [step["t"] for step in steps] == [0, 1, 2]
    assert len({step["ka"] for step in steps}) == 1
    assert steps[2]["forgetting"] == 0.0


def test_joint_training_is_reported_at_the_end_only() -> None:
    plan, store = finished(["multitask"])
    steps = found.results(plan, store)["trajectories"][0]["steps"]
    assert [(step["t"], step["task"]) for step in steps] == [(0, "base"), (2, "multitask")]
    assert steps[1]["forgetting"] is None


def test_unfinished_study_gives_what_is_there_and_says_so() -> None:
    plan, store = finished(["best_in_time", "zero_shot"], upto=1)
    answer = found.results(plan, store)
    assert answer["complete"] is False
    assert [len(trajectory["steps"]) for trajectory in answer["trajectories"]] == [2, 3]


def test_study_that_has_not_begun_has_no_steps() -> None:
    plan, _ = finished(["best_in_time"])
    answer = found.results(plan, FakeStore())
    assert answer["trajectories"][0]["steps"] == []
    assert found.table(answer) == found.summary(answer) == []


def test_gap_in_the_middle_leaves_forgetting_unknown_after_it() -> None:
    plan, store = finished(["best_in_time"])
    del store.known[plan.trajectories[0].points[1].evaluate]
    steps = found.results(plan, store)["trajectories"][0]["steps"]
    assert [step["t"] for step in steps] == [0, 2]
    assert steps[1]["forgetting"] is None
    assert steps[1]["ka"] == pytest.approx(0.6)


def test_every_record_is_read_once() -> None:
    plan, store = finished(["zero_shot", "best_in_time", "offline_merging"])
    store.reads = 0
    found.results(plan, store)
    assert store.reads <= len(plan.steps) + 1


def test_table_has_a_row_per_trajectory_and_t() -> None:
    plan, store = finished(["best_in_time", "zero_shot"])
    rows = found.table(found.results(plan, store))
    assert [(row["trajectory"], row["t"]) for row in rows[:4]] == [
        ("best_in_time", 0),
        ("best_in_time", 1),
        ("best_in_time", 2),
        ("zero_shot", 0),
    ]
    assert rows[2]["gm"] == pytest.approx(0.6)


def test_summary_is_mean_and_sample_deviation_over_seeds_at_a_common_t() -> None:
    step = {"zs": 0.5, "task": "d"}
    answer = {
        "trajectories": [
            {
                "group": "g",
                "steps": [{"t": 1, "ka": 0.2, "gm": 0.1, **step}, {"t": 2, "ka": 0.9, "gm": 0.9, **step}],
            },
            {"group": "g", "steps": [{"t": 1, "ka": 0.4, "gm": 0.1, **step}]},
            {"group": "h", "steps": [{"t": 1, "ka": 0.3, "gm": None, **step}]},
        ]
    }
    first, second = found.summary(answer)
    assert (first["group"], first["seeds"], first["t"]) == ("g", 2, 1)
    assert first["ka"] == pytest.approx(0.3)
    assert first["ka_sd"] == pytest.approx(math.sqrt(0.02))
    assert first["gm_sd"] == 0.0
    assert (second["seeds"], second["ka_sd"], second["gm"]) == (1, None, None)


def trajectory(group: str, seed: int, *gms: float | None, task: str = "a") -> dict[str, Any]:
    steps = [{"t": t, "task": task, "ka": gm, "zs": gm, "gm": gm} for t, gm in enumerate(gms)]
    return {"id": f"{group}-{seed}", "group": group, "steps": steps}


def test_winner_is_the_first_seed_of_the_group_with_the_best_mean_at_the_end() -> None:
    rows = [
        trajectory("early", 0, 0.9, 0.1),
        trajectory("lucky", 0, 0.1, 0.6), trajectory("lucky", 1, 0.1, 0.2),
        trajectory("steady", 0, 0.1, 0.5), trajectory("steady", 1, 0.1, 0.5), trajectory("equal", 0, 0.0, 0.5),
    ]  # fmt: skip
    assert found.winner({"trajectories": rows}) == "steady-0"


def test_winner_is_never_the_multitask_reference_and_of_no_scores_nobody() -> None:
    rows = [trajectory("reference", 0, 0.9, task="multitask"), trajectory("a", 0, 0.2)]
    assert found.winner({"trajectories": rows}) == "a-0"
    assert found.winner({"trajectories": [trajectory("a", 0, None), trajectory("b", 0)]}) is None


def test_results_are_written_whole_and_strictly(tmp_path: Path) -> None:
    plan, store = finished(["best_in_time"])
    path = tmp_path / "results.json"
    answer = found.results(plan, store)
    found.write_results(path, answer)
    assert json.loads(path.read_text()) == answer
    with pytest.raises(ValueError):
        found.write_results(path, {"ka": float("nan")})
    assert json.loads(path.read_text()) == answer
    assert list(tmp_path.iterdir()) == [path]


# --- plan, store and results together -------------------------------------------------------------------------------------


def carry_out(plan: Plan, store: Store) -> int:
    """Do every step that is not in the store, with toy weights that depend on the inputs' bytes; how many were done."""
    done = 0
    for step in (*plan.bases.values(), *plan.steps.values()):
        if store.has(step.kind, step.fingerprint):
            continue
        inputs = [(path / WEIGHTS_FILE).read_bytes() for path in store.open_inputs(step).values()]
        with store.staged(step) as stage:
            result: dict[str, Any] = {"seconds": 0.1}
            if step.kind == "evaluate":
                names = [source["dataset"] for source in step.spec["datasets"]]
                result["scores"] = {name: (len(inputs[0]) % 97) / 97 for name in names}
            else:
                (stage / WEIGHTS_FILE).write_bytes(step.fingerprint.encode() + b"".join(inputs)[:500])
            store.commit(step, stage, result, seconds=0.2)
        done += 1
    return done


def test_study_goes_through_a_real_store_once_and_another_order_of_it_finds_everything_done(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path / "store")
    store.prepare()
    presets = ["zero_shot", "continual_finetuning", "offline_merging", "best_in_time", "multitask"]
    plan = make_plan(study(presets, 3), facts(3))
    assert carry_out(plan, store) == 1 + len(plan.steps)
    assert store.verify() == []
    answer = found.results(plan, store)
    assert answer["complete"]
    again = make_plan(study(presets[::-1], 3, name="other"), facts(3))
    assert carry_out(again, store) == 0
    assert again.summary(store)["disk_bytes"] == 0
    by_id = {trajectory["id"]: trajectory for trajectory in found.results(again, store)["trajectories"]}
    assert by_id == {trajectory["id"]: trajectory for trajectory in answer["trajectories"]}
    for step in again.steps.values():
        assert store.path(step.kind, step.fingerprint, step.slug).is_dir()


def test_damaged_expert_is_made_again_with_the_same_bytes_and_nothing_else_is(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.prepare()
    plan = make_plan(study(["best_in_time"], 3), facts(3))
    carry_out(plan, store)
    before = found.results(plan, store)
    expert = store.record("train", plan.trajectories[0].points[2].train or "")
    assert expert is not None
    (expert.path / WEIGHTS_FILE).write_bytes(b"damaged")
    with pytest.raises(CorruptArtifact):
        store.open_verified(expert)
    assert carry_out(plan, store) == 1
    assert found.results(plan, store) == before
    assert store.verify() == []
