"""Scores on a validation split: other evaluations of the same checkpoints, never mixed with scores on test."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merge_service.errors import UserError
from pipeline.errors import PlanError
from pipeline.plan.facts import gather
from pipeline.plan.file import decode, encode
from pipeline.plan.steps import Facts, Plan
from pipeline.report.build import choose, write_report
from pipeline.report.figures import prepare
from pipeline.report.sources import Studied
from pipeline.results import over_time as found
from pipeline.run.evaluation import score
from pipeline.study.config import load_study
from pipeline.study.suites import check
from pipeline.tracking.rows.names import trajectory_names
from tests.pipeline.plan_toys import facts, make_plan, study
from tests.pipeline.report_toys import invented
from tests.pipeline.study.test_suites import bare, entry, suite_of
from tests.pipeline.tracked_study import finished_study
from tests.world import World, make_world
from workers.data.manifest import describe
from workers.data.writer import Sample, write_dataset
from workers.models.model import export_base

BOTH = {"evaluation.split": ["val", "test"]}


def with_val(without: tuple[str, ...] = ()) -> Facts:
    known = facts(3)
    datasets = {
        name: one if name in without else replace(one, digests={**one.digests, "val": f"{name}/val"})
        for name, one in known.datasets.items()
    }
    return replace(known, datasets=datasets)


def planned(grid: dict[str, Any] | None = None, **changes: Any) -> Plan:
    raw = {"strategies": ["zero_shot", "continual_finetuning", "best_in_time"], **(grid or {})}
    return make_plan(study([], grid=raw, **changes), with_val())


def kinds(plan: Plan, kind: str) -> set[str]:
    return {fp for fp, step in plan.steps.items() if step.kind == kind}


def read(plan: Plan) -> set[str]:
    return {source["split"] for fp in kinds(plan, "evaluate") for source in plan.steps[fp].spec["datasets"]}


def test_test_is_the_default_and_has_no_part_in_fingerprints() -> None:
    plain, said = planned(), planned(evaluation={"split": "test"})
    assert plain == said and read(plain) == {"test"}
    assert make_plan(study(["best_in_time"]), facts(3)).steps.keys() <= plain.steps.keys()


def test_val_makes_other_evaluations_of_the_same_checkpoints() -> None:
    on_test, on_val = planned(), planned(evaluation={"split": "val"})
    for kind in ("train", "merge"):
        assert kinds(on_test, kind) == kinds(on_val, kind)
    assert not kinds(on_test, "evaluate") & kinds(on_val, "evaluate")
    assert read(on_val) == {"val"} and on_val.splits == ("val",)
    assert all(step.label.startswith("val ") for step in on_val.steps.values() if step.kind == "evaluate")
    assert decode(encode(on_val)) == on_val


def test_axis_of_both_splits_shares_every_step_but_the_evaluations() -> None:
    both, on_test = planned(BOTH), planned()
    on_val = planned(evaluation={"split": "val"})
    assert set(both.steps) == set(on_test.steps) | set(on_val.steps)
    ids = [trajectory.id for trajectory in both.trajectories]
    assert ids[:2] == ["zero_shot-val", "zero_shot-test"] and len(set(ids)) == 6
    assert len(set(trajectory_names(both.trajectories).values())) == 6
    by_id = {trajectory.id: trajectory for trajectory in both.trajectories}
    twin = both.served_alike(by_id["best_in_time-val"], "test")
    assert twin is by_id["best_in_time-test"] and (twin.split, both.splits) == ("test", ("test", "val"))
    for trajectory in both.trajectories:
        for fp in {p.evaluate for p in trajectory.points} | {p.own for p in trajectory.points if p.own}:
            assert {s["split"] for s in both.steps[fp].spec["datasets"]} == {trajectory.split}


def test_classes_over_time_are_scored_on_val_too() -> None:
    plan = make_plan(
        study(["best_in_time"], stream={"order": "random", "chunks": 4, "tasks": ["d1", "d2"]}, evaluation={"split": "val"}),
        with_val(),
    )  # fmt: skip
    assert read(plan) == {"val"} and len(plan.trajectories[0].points) == 5


def test_sets_without_val_are_refused_in_one_message() -> None:
    asked = study(["best_in_time"], evaluation={"split": "val"})
    with pytest.raises(PlanError) as caught:
        make_plan(asked, with_val(without=("d2", "kept", "pool")))
    text = str(caught.value)
    assert (
        "no val split of d2, kept;" in text
        and "somewhere/d2/val" in text
        and "evaluation.split to test" in text
    )


def test_split_that_does_not_exist_is_refused_with_its_key() -> None:
    with pytest.raises(UserError, match=r"evaluation\.split: .*not one of test, val"):
        study(["zero_shot"], evaluation={"split": "train"})
    with pytest.raises(UserError, match=r"evaluation\.split\[1\]"):
        study([], grid={"strategies": ["zero_shot"], "evaluation.split": ["val", "dev"]})


def told(plan: Plan) -> dict[str, Any]:
    """Results in which fine-tuning is best on test and Best-in-TIME on val."""
    answer = invented(plan)
    for trajectory in answer["trajectories"]:
        liked = {"test": "continual_finetuning", "val": "best_in_time"}[trajectory["split"]]
        for step in trajectory["steps"]:
            step["gm"] = 0.6 if liked in trajectory["id"] else 0.5
    return answer


def test_results_say_the_split_and_the_winner_is_chosen_on_val() -> None:
    answer = told(planned(BOTH))
    assert {one["id"].rpartition("-")[2] for one in answer["trajectories"]} == {"val", "test"}
    assert all(one["id"].endswith(one["split"]) for one in answer["trajectories"])
    assert found.winner(answer) == "best_in_time-val"
    assert found.winner(found.on_split(answer, "test")) == "continual_finetuning-test"
    assert {row["split"] for row in found.summary(answer)} == set(found.splits_of(answer)) == {"test", "val"}


def test_results_older_than_splits_are_of_test() -> None:
    answer = told(planned(BOTH))
    for one in answer["trajectories"]:
        del one["split"]
    assert found.splits_of(answer) == ("test",) and found.winner(answer)


def test_advice_on_test_is_what_val_chose() -> None:
    plan = planned(BOTH)
    answer = told(plan)
    on_test = prepare([found.on_split(answer, "test")])
    assert choose(plan, answer, on_test) == (
        "best_in_time-test",
        "Deploy best_in_time-test: chosen on val (GM 0.600 at t=3); on test its GM is 0.500 at t=3, "
        "0.100 below the best there, continual_finetuning-test, which was not known when choosing.",
    )
    assert choose(plan, found.on_split(answer, "test"), on_test) is None


def test_report_on_val_lies_beside_the_one_on_test_and_says_so(tmp_path: Path) -> None:
    plan = planned(BOTH)
    written = write_report([Studied(tmp_path, plan, told(plan))], split="val")
    assert written["html"] == str(tmp_path / "report-val" / "report.html")
    assert written["advice"].startswith("Deploy best_in_time-val: GM 0.600")
    page = Path(written["html"]).read_text()
    assert (
        "Scores are on the val split; for those on test: temporal-merge report" in page and "(on val)" in page
    )
    standing = (tmp_path / "report-val" / "tables" / "standing.csv").read_text()
    assert "best_in_time-val" in standing and "-test" not in page + standing
    with pytest.raises(UserError, match="--split dev: the study is scored on test and val"):
        write_report([Studied(tmp_path, plan, told(plan))], split="dev")


def test_tracker_says_which_split_wherever_it_is_not_test(tmp_path: Path) -> None:
    tracked = finished_study(tmp_path, strategies=("zero_shot", "best_in_time"), axes=BOTH)
    projection = tracked.projection()
    rows = [row.payload for row in projection.started(0)]
    for fp, step in tracked.plan.steps.items():
        rows += [row.payload for row in projection.step(step, tracked.records[fp])]
    tags = {row["run"]: row["tags"] for row in rows if row["op"] == "run"}
    assert tags["trajectory/best_in_time-val"]["evaluation.split"] == "val"
    logs = [row for row in rows if row["op"] == "log"]
    experts = {metric[0] for row in logs if row["run"].startswith("expert/") for metric in row["metrics"]}
    assert {
        "own_task_score",
        "own_task_score_val",
        "base_own_task_score",
        "base_own_task_score_val",
    } <= experts
    base = next(row["model"] for row in logs if row["run"] == "study")
    of_base = [(row["run"], metric) for row in logs if row["model"] == base for metric in row["metrics"]]
    digests = {(source["dataset"], source["split"]): source["digest"][:12] for fp in kinds(tracked.plan, "evaluate") for source in tracked.plan.steps[fp].spec["datasets"]}  # fmt: skip
    for run, (name, _, _, _, dataset, digest) in of_base:
        assert run in ("study", "trajectory/zero_shot-test")
        if dataset is not None:
            assert digest == digests[dataset, "val" if name.endswith("_val") else "test"]
    assert {"ka", "ka_val"} <= {metric[0] for _, metric in of_base}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world whose sets have a val split, of which `pairs` (retrieval) has a sample for each caption."""
    home = tmp_path_factory.mktemp("splits")
    made = make_world(home)
    rng = np.random.default_rng(5)
    image = [rng.integers(0, 255, (16, 16, 3)).astype(np.uint8) for _ in range(4)]
    pairs = [Sample(image[i // 2], captions=(f"thing {i}",)) for i in range(8)]
    for name in ("one", "two"):
        splits = {s: [Sample(image[i % 4], i % 3) for i in range(n)] for s, n in (("train", 9), ("test", 6), ("val", 7))}  # fmt: skip
        write_dataset(
            home / "data" / name, kind="classification", classes=["dark", "middle", "light"], templates=["a {c}"],
            splits=splits,
        )  # fmt: skip
    write_dataset(home / "data" / "pairs", kind="retrieval", classes=[], templates=[], splits={"val": pairs})
    export_base(str(home / "model.json"), None, home / "base", seed=1)
    return made


def on_val(world: World) -> Any:
    file = world.study(
        stream={"tasks": ["one", "two"]},
        data={"root": str(world.home / "data"), "pretraining": [], "held_out": ["pairs"], "cache": str(world.home / "cache")},
        recipe={"batch_size": 12, "precision": "fp32", "mixture": {"update": 1}},
        evaluation={"split": "val"},
        grid={"strategies": ["zero_shot"]},
    )  # fmt: skip
    return load_study(file).resolved()


def test_survey_of_val_finds_captions_that_are_samples(world: World) -> None:
    known = gather(on_val(world))
    shards = describe(world.home / "data", "pairs", world.home / "cache").splits["val"].digest
    assert known.datasets["pairs"].digests["val"] != shards
    assert any("8 samples of val show 4 pictures" in note for note in known.notes)


def test_checkpoint_is_scored_on_the_split_that_is_asked_for(world: World) -> None:
    study, base = on_val(world), world.home / "base"
    answer = score(base, study, None)
    assert (answer["split"], answer["samples"]) == ("val", {"one": 7, "two": 7, "pairs": 8})
    assert answer["zs_never_replayed"] == answer["zs"] and answer["zs_replayed"] is None
    assert score(base, study, ["one"], "test")["samples"] == {"one": 6}
    with pytest.raises(UserError, match="--split train"):
        score(base, study, ["one"], "train")
    lacking = study.model_copy(update={"data": study.data.model_copy(update={"held_out": ("grey", "blue")})})
    with pytest.raises(PlanError, match="no val split of grey, blue"):
        score(base, lacking, None)


def test_check_asks_for_the_val_split_that_a_suite_states_and_for_no_other(tmp_path: Path) -> None:
    suite, root = suite_of(tmp_path, entry("d1", val=4), entry("d2")), tmp_path / "root"
    bare(root, "d1"), bare(root, "d2", splits=("train", "test", "val"))
    (finding,) = check(suite, root)
    assert (finding.dataset, finding.what) == ("d1", "wrong")
    assert f"{root / 'd1' / 'val'} is missing or holds no *.tar; convert the val split" in finding.text
    (root / "d2" / "val" / "nshards.txt").write_text("2\n")
    assert "val holds 1 shards, its nshards.txt states 2" in check(suite, root)[1].text
