"""Claims are judged by results: of invented reproductions in which they hold or do not, in pieces, and from kept rows alone."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from merge_service.errors import UserError
from pipeline.claims import __main__ as command
from pipeline.claims import contrasts
from pipeline.claims.claims import claims_of
from pipeline.claims.figures import draw_all
from pipeline.claims.judge import (
    EQUIVALENT,
    HOLDS,
    REFUTED,
    UNDECIDED,
    Judged,
    judge,
)
from pipeline.claims.page import About, page
from pipeline.claims.remarks import filled, quantity
from pipeline.claims.results import COLUMNS, Findings, read_rows, read_run, write_rows
from pipeline.claims.tuning import (
    TUNING,
    read_tuned,
    strangers,
    swept,
    tune,
    with_parameters,
    write_tuned,
)
from pipeline.study.config import load_study
from tests.pipeline.claims.toys import REPLICATES, TECHNIQUES, findings, gm_of, tuned

ROOT = Path(__file__).parents[3]
STUDIES = ROOT / "configs" / "studies" / "time_claims"
ABOUT = About("a small one.", "orders.", "m", "c", {}, "folder")


def judged(found: Findings | None = None) -> tuple[Judged, ...]:
    return of_toys() if found is None else judge(claims_of(found, tuned()))


@cache
def of_toys() -> tuple[Judged, ...]:
    return judge(claims_of(findings(), tuned()))


def test_every_claim_holds_where_it_was_put_into_the_scores() -> None:
    found = {one.claim.number: (one.verdict, one.settled_by.key) for one in judged()}
    assert {number: verdict for number, (verdict, _) in found.items()} == dict.fromkeys(
        [f"C{n}" for n in range(1, 9)], HOLDS
    ), found


def swapped(one: str, other: str) -> Any:
    """Scores in which two strategies (init/deploy) changed places."""

    def score(row: dict[str, Any]) -> float:
        cell = f"{row['init']}/{row['deploy']}"
        init, deploy = {one: other, other: one}.get(cell, cell).split("/")
        return gm_of({**row, "init": init, "deploy": deploy})

    return score


def of_techniques(row: dict[str, Any]) -> float:
    """Scores that depend almost only on the technique."""
    return (
        0.4
        + gm_of(row) / 100
        + 0.1 * (TECHNIQUES.index(row["technique"]) if row["technique"] in TECHNIQUES else 0)
    )


@pytest.mark.parametrize(
    ("number", "score", "by"),
    [
        ("C1", swapped("base/all", "latest/latest"), {"gm", "ka"}),
        ("C2", lambda row: gm_of(row) + 0.2 * (row["technique"] != "average" and row["init"] == "base"), {"gain", "replay", "spread"}),
        ("C3", lambda row: gm_of(row) - 0.2 * (row["replay"] and row["study"] == "offline" and row["init"] == "base"), {"replay"}),
        ("C4", of_techniques, {"all", "in_time"}),
        ("C5", swapped("ema/ema", "latest/latest"), {"replay", "no_replay"}),
        ("C6", lambda row: gm_of(row) - 0.1 * {"s": 0, "m": 1, "l": 2}[row["model"]], {"size"}),
        ("C7", lambda row: gm_of(row) - 0.05 * row["multiplier"] * (row["init"] == "ema"), {"nearer", "within"}),
        ("C8", lambda row: gm_of(row) * (-1 if row["tasks"] == 20 else 1), {"order", "behind"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_claim_is_refuted_where_the_scores_say_the_opposite(number: str, score: Any, by: set[str]) -> None:
    one = {one.claim.number: one for one in judged(findings(score))}[number]
    assert (one.verdict, one.settled_by.key in by) == (REFUTED, True), one.settled_by


def test_order_of_unlike_strategies_alone_does_not_make_the_ranking_hold() -> None:
    """The three groups keep their places, and the order within them is reversed; this once gave a rank correlation of .86."""
    middle = {"latest/latest": 0.4925, "latest/ema": 0.4925, "ema/latest": 0.4925, "ema/ema": 0.4925, "latest/all": 0.415, "ema/all": 0.415, "base/all": 0.305, "base/ema": 0.305}  # fmt: skip

    def score(row: dict[str, Any]) -> float:
        value, centre = gm_of(row), middle.get(f"{row['init']}/{row['deploy']}")
        return value if centre is None or row["tasks"] != 20 else centre - 0.2 * (value - centre)

    one = judged(findings(score))[7]
    parts = {part.key: part for part in one.claim.parts}
    assert parts["all"].mean > 0.7 and parts["groups"].mean > 0.8
    assert parts["order"].mean < 0 and one.verdict != HOLDS


def test_difference_that_does_not_count_reads_as_equivalent_and_not_as_a_coin() -> None:
    tie = findings(
        lambda row: (
            gm_of({**row, "init": "latest", "deploy": "latest", "technique": "-"}) - 0.002
            if (row["init"], row["deploy"]) == ("ema", "ema")
            else gm_of(row)
        )
    )
    assert judged(tie)[4].verdict == EQUIVALENT


def test_one_replicate_decides_nothing() -> None:
    assert {one.verdict for one in judged(findings().of_one_replicate())} == {UNDECIDED}


def test_parts_whose_study_or_split_is_not_there_are_left_out() -> None:
    rows = findings().rows
    less = rows[~rows["study"].isin([contrasts.RATES, contrasts.DATASETS])].assign(
        zs_replayed=float("nan"), stream_zs_replayed=float("nan")
    )
    keys = [{part.key for part in one.parts} for one in claims_of(Findings(less), tuned())]
    whole = [{part.key for part in one.parts} for one in claims_of(findings(), tuned())]
    assert whole[0] - keys[0] == {"zs_replayed", "datasets", "rate_0.0001", "rate_1e-05"}
    assert whole[4] - keys[4] == {"zs_replayed", "stream_zs_replayed", "datasets"}


def test_keys_and_names_of_parts_are_distinct_within_every_claim() -> None:
    for one in claims_of(findings(), tuned()):
        assert (
            len({part.key for part in one.parts}) == len({part.says for part in one.parts}) == len(one.parts)
        )


def test_ambiguous_or_missing_trajectories_are_told_by_study_and_selection() -> None:
    found = findings()
    with pytest.raises(UserError, match="study cells has no finished trajectory"):
        found.metric("cells", init="nowhere")
    with pytest.raises(UserError, match="is not one trajectory"):
        found.metric("cells", init="base", deploy="all")


# --- parameters and rivals -----------------------------------------------------------------------------------------------


def test_rivals_are_the_best_of_the_tuning_whatever_the_judged_scores_say() -> None:
    def score(row: dict[str, Any]) -> float:
        tuning = row["study"] in TUNING
        return gm_of(row) + 0.3 * ((row["technique"] == "magmax" and row["init"] == "base") if tuning else row["technique"] == "ties") + 0.3 * (
            f"{row['init']}/{row['deploy']}" == ("all/ema" if tuning else "all/latest")
        )  # fmt: skip

    found = tune(findings(score))
    assert found.technique == {True: "magmax", False: "magmax"}
    assert found.strategy == {True: ("all", "ema"), False: ("all", "ema")}


def test_best_of_the_grid_is_chosen_and_its_edges_are_counted() -> None:
    def score(row: dict[str, Any]) -> float:
        return gm_of(row) + 0.01 * ("0.6" in row["params"])

    rows = swept(findings(score))
    several = rows.groupby(["replay", "init", "deploy", "technique"])["params"].transform("nunique") > 1
    assert set(rows[rows["chosen"] & several]["params"]) == {'{"weight": 0.6}'}
    assert rows[rows["chosen"] & several]["edge"].all() and not rows[~several]["edge"].any()
    inner = findings().rows
    third = inner[inner["study"].isin(TUNING) & inner["params"].str.contains("0.6")].assign(
        params='{"weight": 0.9}'
    )
    wide = swept(Findings(pd.concat([findings(score).rows, third])))
    assert not wide[wide["params"] == '{"weight": 0.6}']["edge"].any()


def test_choice_is_written_and_read_again(tmp_path: Path) -> None:
    before = tuned()
    write_tuned(tmp_path / "tuned.yaml", before)
    assert read_tuned(tmp_path / "tuned.yaml") == before
    with pytest.raises(UserError, match="--only tuning tuning_no_replay first"):
        read_tuned(tmp_path / "none.yaml")


def test_study_gets_the_tuned_parameters_and_keeps_its_own() -> None:
    study = {
        "name": "toy",
        "recipe": {"mixture": {"buffer": 0.3}},
        "grid": {
            "strategies": [
                "zero_shot",
                {"init": ["base", "ema"], "deploy": "ema", "technique": "average"},
                {"init": "base", "deploy": "all", "technique": "average", "params": {"schedule": "linear"}},
            ]
        },
    }
    weight = {"deploy": "ema", "technique": "average", "params": {"weight": 0.4}}
    assert with_parameters(study, tuned()) == [
        "zero_shot", {"init": "base", **weight}, {"init": "ema", **weight}, study["grid"]["strategies"][2],
    ]  # fmt: skip
    study["grid"]["strategies"] = [{"init": "base", "deploy": "all", "technique": "karcher"}]
    with pytest.raises(UserError, match="toy: base -> all by karcher was not tuned with replay"):
        with_parameters(study, tuned())


def test_rows_with_parameters_that_were_not_chosen_are_told() -> None:
    assert strangers(findings(), tuned()) == []
    rows = findings().rows
    wrong = rows["params"].mask((rows["study"] == "cells") & (rows["init"] == "all") & (rows["technique"] == "ties") & (rows["deploy"] == "ema"), '{"weight": 0.7}')  # fmt: skip
    told = strangers(Findings(rows.assign(params=wrong)), tuned())
    assert len(told) == len(REPLICATES) and '0.7}, the grid says {"weight": 0.4}' in told[0]


# --- the page ------------------------------------------------------------------------------------------------------------


def test_page_has_every_verdict_and_shows_a_remark_beside_its_own_verdict_alone() -> None:
    found = findings()
    remarks = {
        "C1": {"verdict": HOLDS, "text": "offline {cells base/all gm}, by {C1.gm} at least {C1.gm.low:.2f}"},
        "C2": {"verdict": REFUTED, "text": "an old thought with {no such number}"},
    }
    about = About(**{**ABOUT.__dict__, "remarks": remarks})
    text = page(judged(), found, tuned(), about)
    assert all(
        f"## {one.claim.number}\n" in text and f"**{one.claim.claim}: {one.verdict}.**" in text
        for one in judged()
    )
    mean = found.metric("cells", init="base", deploy="all", technique="average").mean()
    assert (
        f"offline {mean:.3f}, by".replace("0.", ".") in text
        and "an old thought" not in text
        and "is left out" in text
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("C1.nothing", "no such comparison"),
        ("cells base/all", "neither a comparison nor scores"),
        ("cells base/all loss", "neither a comparison nor scores"),
        ("cells base/all gm colour=red", "colour is none of"),
        ("cells nowhere/all gm", "no finished trajectory"),
        ("budgets ema/ema gm", "not one trajectory"),
    ],
)
def test_number_of_a_remark_that_is_not_to_be_had_is_an_error(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        quantity(name, findings(), judged())


def test_number_of_a_remark_is_that_of_the_rows() -> None:
    found, everything = findings(), judged()
    assert (
        quantity("budgets ema/ema zs multiplier=4", found, everything)
        == found.metric("budgets", "zs", **contrasts.BEST_IN_TIME, multiplier=4.0).mean()
    )
    assert (
        quantity("learning_rates base/all gm lr=1e-5 max", found, everything)
        == found.metric("learning_rates", **contrasts.OFFLINE_AVERAGE, lr=1e-5).max()
    )
    assert (
        quantity("cells base/all stream_ka technique=ties", found, everything)
        == found.metric("cells", "stream_ka", init="base", deploy="all", technique="ties").mean()
    )
    part = everything[0].claim.parts[0]
    assert quantity("C1.gm.high", found, everything) == part.mean + part.half_width()
    with pytest.raises(UserError, match=r"has the number \.5 typed in"):
        filled("half of {C1.gm}, or .5", found, everything)


def test_every_figure_is_drawn_of_marks() -> None:
    pictures = draw_all(findings())
    assert len(pictures) == 8
    assert all(text.startswith("<svg") and text.count("<path") > 10 for text in pictures.values())


# --- stages --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> command.Places:
    """All rows and parameters of the toy, kept as files, and an empty place for studies to run."""
    monkeypatch.setattr(
        command, "read_plan", lambda: {"setting": "small.", "covers": "orders.", "remarks": {}, "quick": {}}
    )
    there = command.Places(tmp_path / "runs", tmp_path / "page.md", tmp_path / "tuned.yaml")
    for _, rows in findings().rows.groupby("study"):
        write_rows(there.rows, rows)
    write_tuned(there.tuned, tuned())
    return there


def test_rows_are_read_as_they_were_written(places: command.Places) -> None:
    kept = read_rows(places.rows, command.NAMES).rows
    order = ["study", "trajectory", "params"]
    pd.testing.assert_frame_equal(
        kept.sort_values(order).reset_index(drop=True),
        findings().rows.sort_values(order).reset_index(drop=True),
        check_exact=False, rtol=1e-9,
    )  # fmt: skip


def test_page_and_verdicts_come_from_the_kept_rows_alone(places: command.Places) -> None:
    answer = command.judge_rows(places)
    command.write(places, *answer)
    links = re.findall(r"\]\(([^#)]+)\)", places.page.read_text())
    assert links and all((places.page.parent / link).is_file() for link in links)
    kept = json.loads((places.data / "claims.json").read_text())
    assert kept["C1"]["parts"][0]["effect"] == pytest.approx(answer[0][0].claim.parts[0].mean)
    assert not places.out.exists()


def test_rows_with_other_parameters_than_the_tuned_file_are_refused(places: command.Places) -> None:
    text = places.tuned.read_text()
    places.tuned.write_text(text.replace("weight: 0.4", "weight: 0.5"))
    with pytest.raises(UserError, match="run these studies again"):
        command.judge_rows(places)


def test_rows_of_another_base_or_suite_than_the_rest_are_refused(places: command.Places) -> None:
    file = places.rows / "no_replay.csv"
    file.write_text(file.read_text().replace(",0.2,", ",0.21,"))
    with pytest.raises(UserError, match="zero-shot scores of no_replay are of another base"):
        command.judge_rows(places)


def test_study_alone_gives_its_rows_and_the_last_tuning_the_parameters(
    places: command.Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each study in its turn, its store gone when the next one comes; nothing but rows and parameters is read."""
    ran: list[str] = []
    kept = {name: read_rows(places.rows, [name]).rows for name in command.NAMES}
    for file in (*places.rows.iterdir(), places.tuned):
        file.unlink()
    monkeypatch.setattr(command, "run_programs", lambda study: ran.append(study.name.removeprefix("study ")))
    monkeypatch.setattr(
        command,
        "overrides",
        lambda name, path, more: [] if name in TUNING else [str(read_tuned(path).technique)],
    )
    monkeypatch.setattr(command, "read_run", lambda out, name, made_by: kept[name])
    command.run_studies(TUNING[:1], places, quick=False)
    assert not places.tuned.exists()
    command.run_studies((TUNING[1], *contrasts.STUDIES), places, quick=False)
    assert ran == list(command.NAMES) and read_tuned(places.tuned) == tuned()
    assert {one.verdict for one in command.judge_rows(places)[0]} == {HOLDS}


def test_quick_run_compares_its_replicate_with_the_committed_ones(places: command.Places) -> None:
    command.write(places, *command.judge_rows(places))
    alone = findings().of_one_replicate()
    lines = command.compared(judged(alone), alone, places.data)
    count = len(alone.rows)
    assert lines[0].startswith(f"{5 * count} of {5 * count} final scores of {count} trajectories")
    assert len(lines) > 10 and all(
        "as committed" in line and "all replicates: holds" in line for line in lines[1:]
    )
    moved = findings(
        lambda row: gm_of(row) + 0.01 * (row["study"] == "sizes" and row["model"] == "l")
    ).of_one_replicate()
    lines = command.compared(judged(moved), moved, places.data)
    assert not lines[0].startswith(f"{5 * count} of")
    assert next(line for line in lines[1:] if "as committed" not in line).startswith("C6.size +")
    assert command.compared(judged(alone), alone, places.out) == ["no committed numbers to compare with"]


def test_studies_that_never_ran_are_refused_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--judge", "--page", str(tmp_path / "page.md")]) == 2
    assert "holds no rows of any study" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"holds no results\.json; give the directory of a study"):
        read_run(tmp_path, "cells", "c")


def test_results_of_before_the_groups_of_zero_shot_become_rows_without_them(tmp_path: Path) -> None:
    study = {"name": "toy", "model": {"config": "tiny-clip-s", "pretrained": None}, "data": {"suite": "mini"}, "stream": {"order": "random", "chunks": 2, "seed": 3}, "recipe": {"lr": 0.001, "batch_size": 8, "precision": "fp32"}, "budget": {"steps_per_task": 1}, "grid": {"strategies": ["continual_finetuning"]}}  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    steps = [{"t": t, "ka": 0.1 * t, "zs": 0.4, "gm": 0.2 * t} for t in range(3)]
    steps[2] |= {"zs_replayed": 0.5, "zs_never_replayed": None}
    one = {
        "id": "continual_finetuning",
        "technique": None,
        "model": "tiny-clip-s",
        "stream": ["a", "b"],
        "steps": steps,
    }
    (tmp_path / "results.json").write_text(
        json.dumps({"complete": True, "plan": "f" * 64, "trajectories": [one]})
    )
    rows = read_run(tmp_path, "toy", "c")
    assert tuple(rows.columns) == COLUMNS
    (row,) = rows.to_dict("records")
    assert (row["replicate"], row["replay"], row["lr"], row["tasks"], row["over_time"]) == (
        "order 3",
        False,
        0.001,
        2,
        "0.0000 0.2000 0.4000",
    )
    assert (row["ka"], row["stream_ka"], row["zs_replayed"]) == (0.2, 0.15, 0.5)
    assert pd.isna(row["zs_never_replayed"]) and pd.isna(row["stream_zs_replayed"])


@pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])
@pytest.mark.parametrize("name", command.NAMES)
def test_study_of_a_claim_is_valid_with_its_tuned_parameters(
    name: str, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    plan = command.read_plan()
    if quick and name in TUNING:
        assert name not in plan["quick"]
        return
    more = plan["quick"][name] if quick else []
    study = load_study(STUDIES / f"{name}.yaml", command.overrides(name, STUDIES / "tuned.yaml", more))
    assert study.name == name and study.storage.store == "runs/time_claims/store"
    replicates = {(str(cell.stream.seed), str(cell.stream.tasks), cell.seed) for cell in study.cells}
    assert len(replicates) == (1 if quick or name in TUNING else 5)
