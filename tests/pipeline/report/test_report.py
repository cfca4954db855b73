"""The report of a study: every figure has data or a reason why not, nothing is loaded from outside, numbers are numbers."""

import html
import json
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest
import vl_convert
from typer.testing import CliRunner

from merge_service.errors import UserError
from pipeline.cli.app import app
from pipeline.plan.file import write
from pipeline.plan.steps import Plan
from pipeline.report import build
from pipeline.report import figures as draw
from pipeline.report.build import draw_all, write_report
from pipeline.report.page import frames_of, payload, records, spec_of, still
from pipeline.report.sources import Studied
from pipeline.results.over_time import winner
from tests.pipeline.plan_toys import REPLAY
from tests.pipeline.report_toys import FULL, MERGED, PAIRS, invented, studied, toy
from tests.pipeline.tracked_study import finished_study

NO_REPLAY = {"pretraining": 0.0, "update": 1.0, "buffer": 0.0}
MIXED = {
    "strategies": ["zero_shot", *({"preset": name, "mixture": mixture} for name in ("continual_finetuning", "best_in_time", "offline_merging") for mixture in (REPLAY, NO_REPLAY))],
    "seed": [0],
}  # fmt: skip
"""Every strategy with replay and without."""


@cache
def full() -> tuple[Plan, dict[str, Any]]:
    plan = toy(FULL)
    return plan, invented(plan)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "compare", lambda *_: PAIRS)
        answer = write_report([studied(out, *full())])
    return out, answer


def test_every_figure_of_a_full_study_has_rows_for_each_of_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compare", lambda *_: PAIRS)
    study = studied(Path("out"), *full())
    data = draw.prepare([study.answer], build.own_costs(study.plan, study.records))
    drawn, missing = draw_all(data, [study])
    assert (
        set(missing) == {"Scaling with the horizon"} and "one horizon" in missing["Scaling with the horizon"]
    )
    rows = frames_of(data, drawn)
    for figure in drawn:
        assert figure.title and figure.reading and not figure.table.empty
        assert all(len(rows[name]) for name in figure.data), figure.name
        spec = figure.chart.to_dict(validate=True)
        columns = {column for name in figure.data for column in rows[name].columns}
        assert set(named_in(spec, "field")) <= columns | set(named_in(spec, "as")), figure.name
    assert len(drawn) == 16


def named_in(spec: Any, key: str) -> Iterator[str]:
    """The columns that a specification reads (`field`), or makes by a transform (`as`)."""
    if isinstance(spec, dict):
        yield from (value for name, value in spec.items() if name == key and isinstance(value, str))
        spec = list(spec.values())
    if isinstance(spec, list):
        for one in spec:
            yield from named_in(one, key)


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
    assert len(pictures) == 32
    for path in pictures:
        if path.suffix == ".svg":
            assert marks(path.read_text()) > 1, path.name
        else:
            assert path.read_bytes().startswith(b"\x89PNG")


def test_chart_without_rows_would_be_noticed() -> None:
    figure = draw.techniques(draw.prepare([full()[1]]))
    assert marks(vl_convert.vegalite_to_svg({**still(spec_of(figure)), "datasets": {"last": []}})) == 0


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
    assert payload["axes"]["seed"] == ["0", "1"] and "ema → ema" not in payload["axes"]["init"]
    assert all("datasets" not in figure["spec"] for figure in payload["figures"])
    assert {name for figure in payload["figures"] for name in figure["data"]} <= set(payload["data"])


def test_page_says_what_to_deploy_and_never_the_multitask_reference(
    built: tuple[Path, dict[str, Any]],
) -> None:
    assert built[1]["advice"] in Path(built[1]["html"]).read_text().replace("&#x27;", "'")
    assert built[1]["advice"].startswith("Deploy init_") and "GFLOPs" in built[1]["advice"]
    rows = draw.prepare([full()[1]]).last.set_index("group")
    joint = rows[rows["joint"]]
    assert len(joint) == 2 and not joint["front"].any() and joint["reference"].all()


def test_page_says_what_its_scores_are_before_it_shows_any(built: tuple[Path, dict[str, Any]]) -> None:
    text = Path(built[1]["html"]).read_text()
    shown = min(text.index("<table"), text.index('class="chart"'))
    for name in ("KA", "ZS", "GM"):
        assert text.count(f"<dfn>{name}</dfn>") == 1 and text.index(f"<dfn>{name}</dfn>") < shown, name


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


def test_small_study_says_why_figures_are_missing_and_has_no_section_without_content(tmp_path: Path) -> None:
    plan = toy({"strategies": ["offline_merging"]})
    answer = write_report([studied(tmp_path, plan)])
    assert set(answer["missing"]) == {
        "Difference of two trajectories", "Technique by strategy", "What matters: the strategy or the technique", "Scaling with the budget",
        "Scaling with the horizon", "GM against cost in GFLOPs", "GM against cost in seconds", "How alike the experts are",
    }  # fmt: skip
    text = Path(answer["html"]).read_text()
    assert all(html.escape(f"{title}: {why}.") in text for title, why in answer["missing"].items())
    parts = re.findall(r'<section id="(\w+)".*?</section>', text, re.DOTALL)
    assert len(parts) == len(set(parts)) and not set(parts) & {"techniques", "difference", "similarity"}
    assert "<dd></dd>" not in text


def test_every_link_of_a_page_leads_somewhere(built: tuple[Path, dict[str, Any]]) -> None:
    out, answer = built
    text = re.sub(r"<script.*?</script>", "", Path(answer["html"]).read_text(), flags=re.DOTALL)
    links = [html.unescape(link) for link in re.findall(r'href="([^"]+)"', text)]
    anchors = set(re.findall(r' id="([^"]+)"', text))
    files = [link for link in links if not link.startswith(("#", ".."))]
    assert len(files) > 40 and all((out / "report" / link).is_file() for link in files)
    assert {link[1:] for link in links if link.startswith("#")} <= anchors


def test_unfinished_study_is_reported_as_far_as_it_is(tmp_path: Path) -> None:
    plan = toy({"strategies": ["offline_merging"]})
    answer = write_report([Studied(tmp_path, plan, invented(plan, upto=2))])
    assert not answer["complete"] and "The study is not finished" in Path(answer["html"]).read_text()


def test_study_without_a_score_is_refused_with_what_to_do_and_leaves_nothing(tmp_path: Path) -> None:
    plan = toy(FULL)
    with pytest.raises(UserError, match=r"nothing to report.*temporal-merge status"):
        write_report([Studied(tmp_path, plan, invented(plan, upto=-1))])
    assert not list(tmp_path.iterdir())


def test_new_report_replaces_the_old_one_whole(tmp_path: Path) -> None:
    (tmp_path / "report/figures").mkdir(parents=True)
    stale = tmp_path / "report/figures/stale.png"
    stale.touch()
    plan = toy({"strategies": ["offline_merging"]})
    write_report([Studied(tmp_path, plan, invented(plan))])
    assert not stale.exists() and [path.name for path in tmp_path.iterdir()] == ["report"]


def test_sweep_of_288_trajectories_stays_small_on_the_page_and_quick_to_draw() -> None:
    """Marks that are translucent as a whole need a layer of the picture each; hundreds of grey lines must not be drawn so."""
    plan = toy({"strategies": ["zero_shot", MERGED], "seed": list(range(8)), "budget.multiplier": [1, 2]})
    assert len(plan.trajectories) > 288
    data = draw.prepare([invented(plan)])
    figure = draw.over_time(data)
    assert len(json.dumps(payload([figure, draw.matrix(data)], data))) < 1_000_000
    spec = {**still(spec_of(figure)), "datasets": {"points": records(frames_of(data, [figure])["points"])}}
    assert len(re.findall(r'[" ]opacity="0', vl_convert.vegalite_to_svg(spec))) < 20


def test_multitask_reference_of_a_real_plan_is_neither_advised_nor_registered() -> None:
    _, answer = full()
    (reference, *_) = [one for one in answer["trajectories"] if one["name"] == "multitask"]
    best = {**reference, "steps": [{**step, "gm": 0.99} for step in reference["steps"]]}
    changed = {
        **answer,
        "trajectories": [best if one is reference else one for one in answer["trajectories"]],
    }
    assert draw.prepare([changed]).advice.group != reference["group"]
    assert winner(changed) != reference["id"]


def test_similarity_says_which_merges_clash() -> None:
    assert "No two of them clash" in draw.similarity(PAIRS).reading
    against = PAIRS.assign(cosine=[1, -0.5, -0.5, 1])
    assert "likely to clash: a and b." in draw.similarity(against).reading


# --- equal in everything else ---------------------------------------------------------------------------------------------


def test_cell_of_technique_by_strategy_never_mixes_mixtures() -> None:
    data = draw.prepare([invented(toy(MIXED))])
    figure = draw.techniques(data)
    assert set(figure.table["slice"]) == {"mixture replay 0.33/0.34/0.33", "mixture no replay"}
    assert not figure.table.duplicated(["slice", "choice", "strategy"]).any()
    rows = {name: records(frame) for name, frame in frames_of(data, [figure]).items()}
    texts = re.findall(
        r">(0\.\d{3})<",
        vl_convert.vegalite_to_svg({**still(spec_of(figure)), "datasets": {"last": rows["last"]}}),
    )
    shown = data.last[data.last["slice"] == figure.choices[0].value]
    assert sorted(texts[:3]) == sorted(f"{gm:.3f}" for gm in shown.loc[~shown["reference"], "gm"])


def test_figure_says_that_it_cannot_compare_where_nothing_is_equal() -> None:
    grid = {
        "strategies": [
            {"preset": "offline_merging", "mixture": NO_REPLAY},
            {"preset": "best_in_time", "mixture": REPLAY},
        ]
    }
    data = draw.prepare([invented(toy(grid))])
    with pytest.raises(draw.NoData, match="differ in strategy or technique and in nothing else"):
        draw.techniques(data)
    with pytest.raises(draw.NoData, match="all else equal"):
        draw.spread(data)


def test_scaling_draws_no_line_between_groups_that_differ_in_more_than_the_budget() -> None:
    both = [invented(toy({"strategies": [one]}, tasks=2)) for one in ("offline_merging", "best_in_time")]
    both[1]["trajectories"][0]["budget"] = {"steps_per_task": 200, "multiplier": 2}
    trajectories = [trajectory for answer in both for trajectory in answer["trajectories"]]
    with pytest.raises(draw.NoData, match="cannot be compared"):
        draw.scaling(
            draw.prepare([{**both[0], "trajectories": trajectories}]),
            "steps_per_task",
            "budget",
            "steps per task",
        )


def test_horizon_scaling_is_drawn_over_two_lengths() -> None:
    plans = toy({"strategies": ["offline_merging"]}, tasks=2), toy({"strategies": ["offline_merging"]})
    both = [invented(one) for one in plans]
    for index, trajectory in enumerate(t for answer in both for t in answer["trajectories"]):
        trajectory["group"] = trajectory["id"] = f"length{index}"
        trajectory["settings"]["evaluation.sets"] = "the same"
    data = draw.prepare([{**both[1], "trajectories": [t for answer in both for t in answer["trajectories"]]}])
    assert draw.scaling(data, "tasks", "horizon", "tasks").table["tasks"].tolist() == [2, 3]


# --- several studies ------------------------------------------------------------------------------------------------------


def other(plan: Plan) -> dict[str, Any]:
    return {**invented(plan), "study": "other"}


def test_report_of_two_studies_compares_groups_of_equal_settings_under_their_studies_names(
    tmp_path: Path,
) -> None:
    one, two = toy({"strategies": ["offline_merging"]}), toy({"strategies": ["best_in_time", "zero_shot"]})
    written = write_report([studied(tmp_path / "a", one), studied(tmp_path / "b", two, other(two))])
    assert written["html"] == str(tmp_path / "report-a-b" / "report.html")
    assert written["advice"].startswith("Deploy toy: ") or written["advice"].startswith("Deploy other: ")
    page = Path(written["html"]).read_text()
    assert "toy: offline_merging" in page and "other: best_in_time" in page and "The studies" in page
    payload = json.loads(re.search(r'id="report">(.*?)</script>', page, re.DOTALL)[1])
    assert payload["axes"]["study"] == ["toy", "other"]
    standing = pd.read_csv(tmp_path / "report-a-b" / "tables" / "standing.csv")
    assert set(standing["study"]) == {"toy", "other"}


def test_studies_that_are_scored_on_other_sets_are_not_compared(tmp_path: Path) -> None:
    one, two = toy({"strategies": ["offline_merging"]}), toy({"strategies": ["best_in_time"]}, tasks=2)
    written = write_report([studied(tmp_path / "a", one), studied(tmp_path / "b", two, other(two))])
    assert "cannot be compared with each other" in written["advice"]
    assert written["advice"].count("Deploy ") == 2


def test_command_line_puts_two_runs_of_one_name_into_one_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "compare", lambda *_: None)  # invented weights are no checkpoints
    for name, strategies in (("a", ("zero_shot", "best_in_time")), ("b", ("continual_finetuning",))):
        study = finished_study(tmp_path / name, strategies=strategies, tasks=("animals", "scripts"))
        write(study.plan, study.out / "plan.json")
    ended = CliRunner().invoke(app, ["report", str(tmp_path / "a"), str(tmp_path / "b"), "--json"])
    assert ended.exit_code == 0, ended.output
    told = json.loads(ended.stdout)
    assert told["html"] == str(tmp_path / "report-a-b" / "report.html")
    page = Path(told["html"]).read_text()
    assert f"demo in {tmp_path / 'a'}: best_in_time" in page and "temporal-merge export" in page
    assert f"temporal-merge run {tmp_path / 'b'}/study.yaml --out {tmp_path / 'b'}" in page
    with pytest.raises(UserError, match="named twice"):
        build.build_report(tmp_path / "a", more=[tmp_path / "a"])


def test_report_replaces_no_directory_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    kept = tmp_path / "mine" / "thesis.tex"
    kept.touch()
    with pytest.raises(UserError, match="mine is there and is no report"):
        write_report([studied(tmp_path, toy({"strategies": ["offline_merging"]}))], to=tmp_path / "mine")
    assert kept.is_file()
