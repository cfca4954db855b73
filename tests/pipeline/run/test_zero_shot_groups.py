"""Groups of the held-out sets: stated or derived, each set in exactly one, and reported separately wherever ZS is."""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from merge_service.errors import UserError
from pipeline.plan.file import decode, encode
from pipeline.plan.steps import DatasetFacts, Plan
from pipeline.report import frames
from pipeline.report.build import write_report
from pipeline.report.figures import prepare
from pipeline.report.sections import standing
from pipeline.report.sources import Studied
from pipeline.results import over_time as found
from pipeline.study.config import study_from
from pipeline.study.suites import read_suite_file
from tests.pipeline.plan_toys import facts, make_plan, raw_study, study
from tests.pipeline.report_toys import invented
from tests.pipeline.tracked_study import finished_study
from workers.data import zero_shot
from workers.data.manifest import read_suite

STRATEGIES = ["zero_shot", "continual_finetuning", "best_in_time"]
DATA = {"root": "somewhere", "pretraining": ["pool"], "held_out": ["kept", "pool"]}
STATED = {"replayed": ["kept", "pool"], "never_replayed": []}


def planned(**data: Any) -> Plan:
    known = facts(3)
    known.datasets["new"] = DatasetFacts({"test": "new/test"}, "new")  # type: ignore[index]
    return make_plan(study(STRATEGIES, data=DATA | data), known)


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ({"replayed": ["pool"]}, "kept: in no group"),
        ({"replayed": ["kept", "pool"], "never_replayed": ["kept"]}, "kept: in both groups"),
        ({"replayed": ["pool", "odd"], "never_replayed": ["kept"]}, "odd: not held out"),
        ({"never_replayed": ["kept", "pool"]}, "pool: in the pretraining pool, so not never_replayed"),
    ],
)
def test_set_that_is_not_in_exactly_one_group_is_refused_by_name(
    groups: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"data\.zero_shot_groups: .*{says}"):
        study(STRATEGIES, data=DATA | {"zero_shot_groups": groups})
    roles = {"pretraining": ["pool"], "adaptation": ["d1"], "held_out": ["kept", "pool"]}
    whole = {group: groups.get(group, []) for group in zero_shot.GROUPS}
    (tmp_path / "suite.json").write_text(json.dumps({"name": "x", "roles": roles, "zero_shot_groups": whole}))
    with pytest.raises(UserError, match=f"suite.json: `zero_shot_groups`: .*{says}"):
        read_suite(tmp_path)


def test_suite_json_with_other_groups_is_refused(tmp_path: Path) -> None:
    roles = {"pretraining": [], "adaptation": ["d1"], "held_out": ["kept"]}
    for groups, says in (
        ({"replayed": ["kept"]}, "exactly replayed and never_replayed"),
        ({"replayed": ["kept", "kept"], "never_replayed": []}, "each once"),
    ):
        (tmp_path / "suite.json").write_text(json.dumps({"roles": roles, "zero_shot_groups": groups}))
        with pytest.raises(UserError, match=says):
            read_suite(tmp_path)


def test_groups_that_nobody_states_follow_the_pool() -> None:
    plan = planned()
    assert (
        plan.zero_shot_groups == {"replayed": ("pool",), "never_replayed": ("kept",)} and not plan.own_groups
    )
    assert zero_shot.derived(["kept", "pool"], []) == {"replayed": (), "never_replayed": ("kept", "pool")}


def test_stated_groups_change_no_step_but_name_another_plan() -> None:
    plain, same = planned(), planned(zero_shot_groups={"replayed": ["pool"], "never_replayed": ["kept"]})
    other = planned(zero_shot_groups=STATED)
    assert plain.steps == same.steps == other.steps
    assert plain.fingerprint == same.fingerprint != other.fingerprint
    assert decode(encode(other)) == other


def test_suite_states_the_groups_of_the_sets_that_a_study_holds_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    roles = {"pretraining": ["pool"], "adaptation": ["d1"], "held_out": ["kept", "pool", "twin"]}
    groups = {"replayed": ["twin", "pool"], "never_replayed": ["kept"]}
    home = tmp_path / "data" / "own"
    for name in ("pool", "d1", "kept", "twin", "new"):
        (home / name).mkdir(parents=True)
    (home / "suite.json").write_text(json.dumps({"name": "own", "roles": roles, "zero_shot_groups": groups}))

    def groups_of(**data: Any) -> Any:
        raw = raw_study(STRATEGIES, data={"suite": "own", **data}, stream={"tasks": ["d1"]})
        resolved = study_from(raw).resolved()
        assert study_from(resolved.model_dump(mode="json")).resolved() == resolved
        return resolved.zero_shot_groups

    assert groups_of() == {"replayed": ("pool", "twin"), "never_replayed": ("kept",)}
    assert groups_of(held_out=["twin", "kept"]) == {"replayed": ("twin",), "never_replayed": ("kept",)}
    with pytest.raises(UserError, match="new: in no group"):
        groups_of(held_out=["twin", "new"])
    stated = {"replayed": ["pool"], "never_replayed": ["kept", "twin"]}
    assert groups_of(zero_shot_groups=stated)["never_replayed"] == ("kept", "twin")


def test_suite_file_may_state_groups_and_val(tmp_path: Path) -> None:
    def suite(**groups: Any) -> Path:
        sets = [
            {
                "name": name,
                "role": role,
                "kind": "classification",
                "template": "a {c}",
                "classes": 2,
                "val": val,
            }
            for name, role, val in (("d1", "adaptation", 4), ("kept", "held_out", None))
        ]
        path = tmp_path / "suite.yaml"
        path.write_text(json.dumps({"format": 1, "name": "x", "datasets": sets, "zero_shot_groups": groups}))
        return path

    found = read_suite_file(suite(replayed=["kept"]))
    assert found.zero_shot_groups and found.zero_shot_groups.replayed == ("kept",)
    described = found.described()
    assert described["d1"].splits["val"].samples == 4 and "val" not in described["kept"].splits
    with pytest.raises(UserError, match="kept: in no group"):
        read_suite_file(suite())


def test_results_report_both_groups_and_leave_zs_the_mean_over_all() -> None:
    plan = planned(held_out=["kept", "pool", "new"])
    answer = invented(plan)
    assert answer["zero_shot_groups"] == {"replayed": ["pool"], "never_replayed": ["kept", "new"]}
    for step in answer["trajectories"][0]["steps"]:
        scores = step["scores"]
        assert step["zs_replayed"] == scores["pool"]
        assert step["zs_never_replayed"] == pytest.approx((scores["kept"] + scores["new"]) / 2)
        assert step["zs"] == pytest.approx((scores["kept"] + scores["pool"] + scores["new"]) / 3)
    assert found.summary(answer)[0]["zs_replayed"] == answer["trajectories"][0]["steps"][-1]["zs_replayed"]
    assert found.table(answer)[-1]["zs_never_replayed"] is not None and found.grouped(answer)


def test_empty_group_has_no_score_and_no_column_on_the_page() -> None:
    answer = invented(planned(zero_shot_groups=STATED))
    last = answer["trajectories"][0]["steps"][-1]
    assert last["zs_never_replayed"] is None and last["zs_replayed"] == pytest.approx(last["zs"])
    assert not found.grouped(answer)
    table = standing(prepare([answer]))
    assert ">ZS</button>" in table and ">ZS replayed</button>" not in table


def test_report_shows_both_groups_in_page_and_tables(tmp_path: Path) -> None:
    plan = planned()
    answer = invented(plan)
    page = Path(write_report([Studied(tmp_path, plan, answer)])["html"]).read_text()
    assert re.findall(r">(ZS[^<]*)</button>", page) == ["ZS", "ZS replayed", "ZS never replayed"]
    tables = tmp_path / "report" / "tables"
    for name in ("points", "standing", "plane"):
        rows = pd.read_csv(tables / f"{name}.csv")
        assert rows[["zs_replayed", "zs_never_replayed"]].notna().all(axis=None), name
    scores = pd.read_csv(tables / "matrix.csv").set_index("dataset")
    assert scores.loc["pool", "zero_shot"].eq("replayed").all() and scores.loc["d1", "zero_shot"].isna().all()


def test_tracker_has_both_groups_as_metrics_of_trajectories_and_models(tmp_path: Path) -> None:
    tracked = finished_study(tmp_path)
    projection, logs = tracked.projection(), list[Any]()
    for fp, step in tracked.plan.steps.items():
        logs += [
            row.payload for row in projection.step(step, tracked.records[fp]) if row.payload["op"] == "log"
        ]
    (row,) = (
        one for one in logs if one["model"] == "best_in_time/t2" and any(m[0] == "zs" for m in one["metrics"])
    )
    values = {metric[0]: metric[1] for metric in row["metrics"]}
    assert values["zs_never_replayed"] == values["zs"] and "zs_replayed" not in values


def test_runs_older_than_groups_are_still_read() -> None:
    plan = planned()
    body = encode(plan)
    for key in ("zero_shot_groups", "own_groups"):
        del body[key]
    for trajectory in body["trajectories"]:
        del trajectory["split"]
    old = decode(body)
    assert old.fingerprint == plan.fingerprint and old.steps == plan.steps and old.splits == ("test",)
    answer = invented(old)
    assert answer["trajectories"][0]["steps"][0]["zs_replayed"] is None and not found.grouped(answer)
    for trajectory in answer["trajectories"]:
        del trajectory["split"]
        for step in trajectory["steps"]:
            del step["zs_replayed"], step["zs_never_replayed"]
    del answer["zero_shot_groups"]
    assert (
        frames.points(answer)["zs_replayed"].isna().all() and frames.points(answer)["split"].eq("test").all()
    )
    assert prepare([answer]).last["zs_replayed"].isna().all()
