"""The report of a study: every figure has data or says why not, nothing is loaded from outside, numbers stay numbers."""

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest
import vl_convert

from merge_service.errors import UserError
from pipeline.plan.steps import Plan
from pipeline.report import figures as draw
from pipeline.report.build import draw_all, frames_of, write_report
from pipeline.report.page import spec_of
from pipeline.results.over_time import winner
from tests.pipeline.report_toys import FULL, MERGED, PAIRS, invented, toy


@cache
def full() -> tuple[Plan, dict[str, Any]]:
    plan = toy(FULL)
    return plan, invented(plan)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out")
    plan, answer = full()
    return out, write_report(out, plan, answer, lambda best: PAIRS)


def test_every_figure_of_a_full_study_has_rows_for_each_of_its_data() -> None:
    plan, answer = full()
    data = draw.prepare(answer)
    drawn, missing = draw_all(data, plan, lambda best: PAIRS)
    assert (
        set(missing) == {"Scaling with the horizon"} and "one horizon" in missing["Scaling with the horizon"]
    )
    rows = frames_of(data, drawn)
    for figure in drawn:
        assert figure.title and figure.reading and not figure.table.empty
        assert all(len(rows[name]) for name in figure.data), figure.name
    assert len(drawn) == 9


def marks(svg: str) -> int:
    """How many shapes and texts a chart draws of its data; axes and legends do not count."""
    groups = [
        group
        for group in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}g")
        if re.search(r"role-mark .*marks", group.get("class", ""))
    ]
    return sum(bool(child.get("d") or child.text) for group in groups for child in group)


def test_every_drawn_figure_shows_marks(built: tuple[Path, dict[str, Any]]) -> None:
    pictures = [Path(name) for name in built[1]["figures"]]
    assert len(pictures) == 18
    for path in pictures:
        if path.suffix == ".svg":
            assert marks(path.read_text()) > 1, path.name
        else:
            assert path.read_bytes().startswith(b"\x89PNG")


def test_chart_without_rows_would_be_noticed() -> None:
    figure = draw.techniques(draw.prepare(full()[1]))
    assert marks(vl_convert.vegalite_to_svg({**spec_of(figure), "datasets": {"last": []}})) == 0


def test_page_loads_nothing_from_outside_and_carries_each_row_once(
    built: tuple[Path, dict[str, Any]],
) -> None:
    text = Path(built[1]["html"]).read_text()
    markup = re.sub(r"<script(?: [^>]*)?>.*?</script>", "<script></script>", text, flags=re.DOTALL)
    assert not re.search(r"https?://|<link|<script[^>]+src", markup)
    assert "unsafe-eval" not in markup and "$" not in markup
    assert text.count("<script") == text.count("</script>") == 3
    payload = json.loads(re.search(r'id="report">(.*?)</script>', text, re.DOTALL)[1])
    assert set(payload["axes"]) == {"init", "deploy", "technique", "budget", "seed"}
    assert all("datasets" not in figure["spec"] for figure in payload["figures"])
    assert {name for figure in payload["figures"] for name in figure["data"]} <= set(payload["data"])


def test_page_says_what_to_deploy_and_never_the_multitask_reference(
    built: tuple[Path, dict[str, Any]],
) -> None:
    assert built[1]["advice"] in Path(built[1]["html"]).read_text().replace("&#x27;", "'")
    assert built[1]["advice"].startswith("Deploy init_") and "GFLOPs" in built[1]["advice"]
    rows = draw.prepare(full()[1]).last.set_index("group")
    joint = rows[rows["joint"]]
    assert len(joint) == 2 and not joint["front"].any() and joint["reference"].all()


def test_tables_parse_to_the_numbers_of_the_results(built: tuple[Path, dict[str, Any]]) -> None:
    out, _ = built
    answer = full()[1]
    points = pd.read_csv(out / "report/tables/points.csv").set_index(["trajectory", "t"])
    scores = pd.read_csv(out / "report/tables/matrix.csv").set_index(["trajectory", "t", "dataset"])["score"]
    for trajectory in answer["trajectories"]:
        for step in trajectory["steps"]:
            row = points.loc[(trajectory["id"], step["t"])]
            for metric in ("ka", "zs", "gm", "forgetting", "bwt"):
                want = math.nan if step[metric] is None else step[metric]
                assert row[metric] == pytest.approx(want, abs=1e-15, nan_ok=True)
            for dataset, score in step["scores"].items():
                assert scores[trajectory["id"], step["t"], dataset] == pytest.approx(score, abs=1e-15)


def test_small_study_says_why_figures_are_missing_and_draws_none_of_them_empty(tmp_path: Path) -> None:
    plan = toy({"strategies": ["offline_merging"]})
    answer = write_report(tmp_path, plan, invented(plan))
    assert set(answer["missing"]) == {
        "Technique by strategy", "What matters: the strategy or the technique", "Scaling with the budget",
        "Scaling with the horizon", "How alike the experts are",
    }  # fmt: skip
    text = Path(answer["html"]).read_text()
    assert all(f"Not drawn: {why}" in text for why in answer["missing"].values())


def test_horizon_scaling_is_drawn_over_two_lengths() -> None:
    plan = toy({"strategies": ["offline_merging"]}, tasks=2), toy({"strategies": ["offline_merging"]})
    both = [invented(one) for one in plan]
    for index, trajectory in enumerate(t for answer in both for t in answer["trajectories"]):
        trajectory["group"] = trajectory["id"] = f"length{index}"
    data = draw.prepare({**both[1], "trajectories": [t for answer in both for t in answer["trajectories"]]})
    assert draw.scaling(data, "tasks", "horizon", "tasks").table["tasks"].tolist() == [2, 3]


def test_unfinished_study_is_reported_as_far_as_it_is(tmp_path: Path) -> None:
    plan = toy(FULL)
    answer = write_report(tmp_path, plan, invented(plan, upto=2))
    assert not answer["complete"] and "The study is not finished" in Path(answer["html"]).read_text()


def test_study_without_a_score_is_refused_with_what_to_do_and_leaves_nothing(tmp_path: Path) -> None:
    plan = toy(FULL)
    with pytest.raises(UserError, match=r"nothing to report.*temporal-merge status"):
        write_report(tmp_path, plan, invented(plan, upto=-1))
    assert not list(tmp_path.iterdir())


def test_new_report_replaces_the_old_one_whole(tmp_path: Path) -> None:
    (tmp_path / "report/figures").mkdir(parents=True)
    stale = tmp_path / "report/figures/stale.png"
    stale.touch()
    plan = toy({"strategies": ["offline_merging"]})
    write_report(tmp_path, plan, invented(plan))
    assert not stale.exists() and [path.name for path in tmp_path.iterdir()] == ["report"]


def test_page_of_two_hundred_trajectories_stays_below_ten_megabytes(tmp_path: Path) -> None:
    plan = toy({"strategies": ["zero_shot", MERGED], "seed": list(range(6)), "budget.multiplier": [1, 2]})
    assert len(plan.trajectories) >= 200
    answer = write_report(tmp_path, plan, invented(plan))
    assert Path(answer["html"]).stat().st_size < 10_000_000


def test_multitask_reference_of_a_real_plan_is_neither_advised_nor_registered() -> None:
    _, answer = full()
    (reference, *_) = [one for one in answer["trajectories"] if one["name"] == "multitask"]
    best = {**reference, "steps": [{**step, "gm": 0.99} for step in reference["steps"]]}
    changed = {
        **answer,
        "trajectories": [best if one is reference else one for one in answer["trajectories"]],
    }
    assert draw.prepare(changed).advice.group != reference["group"]
    assert winner(changed) != reference["id"]


def test_similarity_says_which_merges_clash() -> None:
    assert "No two of them clash" in draw.similarity(PAIRS).reading
    against = PAIRS.assign(cosine=[1, -0.5, -0.5, 1])
    assert "likely to clash: a and b." in draw.similarity(against).reading
