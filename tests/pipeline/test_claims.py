"""Claims are judged by what was found: by hand-made effects, by invented reproductions that hold or do not, and by a real run."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from merge_service.errors import UserError
from pipeline.claims import __main__ as command
from pipeline.claims import claims
from pipeline.claims.figures import draw_all
from pipeline.claims.judge import HOLDS, NOT, WEAKLY, Judged, Part, shares
from pipeline.claims.page import page
from pipeline.claims.results import Findings
from pipeline.claims.tuning import TUNING, chosen, strangers
from pipeline.study.config import load_study
from tests.pipeline.claims_toys import REPLICATES, TECHNIQUES, findings, gm_of

STUDIES = Path(__file__).parents[2] / "configs" / "studies" / "time_claims"
ABOUT = {"commit": "c", "machine": "m", "setting": "a small one.", "steps": "3 trajectories"}


def part(*values: float, **more: Any) -> Part:
    return Part("says", pd.Series(values), **more)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.02, 0.03, 0.04), HOLDS),
        ((0.001, 0.002, 0.003), WEAKLY),
        ((-0.01, 0.05, 0.05), WEAKLY),
        ((-0.05, 0.01, 0.01), NOT),
        ((0.0, 0.0, 0.0), NOT),
    ],
    ids=["clear", "small", "one against", "mean against", "nothing"],
)
def test_part_is_judged_by_direction_in_every_replicate_and_size(values: Any, verdict: str) -> None:
    assert part(*values).verdict == verdict


def test_interval_is_students_over_replicates_and_missing_for_one() -> None:
    assert part(0.4, 0.6).half_width == pytest.approx(12.7062047 * 0.1)
    assert math.isnan(part(0.4).half_width)


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        ((part(0.1), part(0.2)), HOLDS),
        ((part(0.1), part(-0.2)), WEAKLY),
        ((part(-0.1), part(0.2)), NOT),
        ((part(0.1), part(-0.2, beside=True)), HOLDS),
    ],
    ids=["all", "main alone", "main against", "beside does not count"],
)
def test_claim_follows_from_its_parts(parts: Any, verdict: str) -> None:
    assert Judged("C0", "claim", "paper", parts).verdict == verdict


def test_variance_is_shared_out_as_in_a_two_way_analysis_by_hand() -> None:
    table = pd.DataFrame({"r": ["a", "a", "b", "b"], "c": ["x", "y", "x", "y"], "gm": [0.0, 2.0, 4.0, 10.0]})
    found = shares(table, "gm", "r", "c")  # grand 4; rows 1, 7: 36; columns 2, 6: 16; cells 0,2,4,10: 56
    assert found == pytest.approx({"r": 36 / 56, "c": 16 / 56, "interplay": 4 / 56})
    with pytest.raises(ValueError, match="gaps"):
        shares(table.iloc[:3], "gm", "r", "c")
    with pytest.raises(ValueError, match="does not vary"):
        shares(table.assign(gm=1.0), "gm", "r", "c")


def test_every_claim_holds_where_it_was_put_into_the_scores() -> None:
    assert {one.number: one.verdict for one in claims.judge_all(findings())} == dict.fromkeys(
        [f"C{n}" for n in range(1, 9)], HOLDS
    )


def swapped(one: str, other: str) -> Any:
    """Scores in which two strategies (init/deploy) changed places."""

    def score(row: dict[str, Any]) -> float:
        cell = f"{row['init']}/{row['deploy']}"
        init, deploy = {one: other, other: one}.get(cell, cell).split("/")
        return gm_of({**row, "init": init, "deploy": deploy})

    return score  # fmt: skip


@pytest.mark.parametrize(
    ("number", "score"),
    [
        ("C1", swapped("base/all", "latest/latest")),
        ("C2", lambda row: gm_of(row) + 0.2 * (row["technique"] == "ties")),
        ("C3", lambda row: gm_of(row) - 0.1 * (row["replay"] and row["study"] == "offline")),
        ("C4", lambda row: 0.4 + len(row["init"]) / 1000 + 0.1 * (TECHNIQUES.index(row["technique"]) if row["technique"] in TECHNIQUES else 0)),
        ("C5", swapped("ema/ema", "latest/latest")),
        ("C6", lambda row: gm_of(row) - 0.1 * {"s": 0, "m": 1, "l": 2}[row["model"]]),
        ("C7", lambda row: gm_of(row) - 0.05 * row["multiplier"] * (row["init"] == "ema")),
        ("C8", lambda row: gm_of(row) * (-1 if row["tasks"] == 20 else 1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_claim_does_not_hold_where_the_scores_say_the_opposite(number: str, score: Any) -> None:
    judged = {one.number: one for one in claims.judge_all(findings(score))}
    assert judged[number].verdict == NOT


def test_ambiguous_or_missing_trajectories_are_told_by_study_and_selection() -> None:
    found = findings()
    with pytest.raises(UserError, match="study cells has no finished trajectory"):
        found.metric("cells", init="nowhere")
    with pytest.raises(UserError, match="is not one trajectory"):
        found.metric("cells", init="base", deploy="all")


def tuned(**best: float) -> Findings:
    """Two grid points of one cell in the tuning study, and what another study used."""
    frame = findings().points
    row = frame[(frame["study"] == "cells") & (frame["init"] == "base") & (frame["technique"] == "ties") & frame["last"]].iloc[0]  # fmt: skip
    grid = [{**row, "study": TUNING[0], "params": params, "gm": gm} for params, gm in best.items()]
    other = {**row, "study": TUNING[1], "replay": False, "params": "{}"}
    return Findings(pd.DataFrame([*grid, other, {**row, "params": "small"}]))


def test_parameters_are_the_best_of_the_grid_and_others_are_told() -> None:
    found = tuned(small=0.5, large=0.4)
    assert chosen(found)[(True, "base", "all", "ties")] == "small"
    assert strangers(found, ("cells",)) == []
    (told,) = strangers(tuned(small=0.4, large=0.5), ("cells",))
    assert "small" in told and "large" in told


def test_page_has_every_verdict_and_shows_a_remark_beside_its_own_verdict_alone() -> None:
    found = findings()
    judged = claims.judge_all(found)
    remarks = {
        "C1": {"verdict": HOLDS, "text": "because of time"},
        "C2": {"verdict": NOT, "text": "an old thought"},
    }
    text = page(judged, found, ABOUT, remarks, "folder")
    assert all(f"## {one.number}\n" in text and f"**{one.claim}: {one.verdict}.**" in text for one in judged)
    assert "because of time" in text and "an old thought" not in text and "is left out" in text


def test_every_figure_is_drawn_of_marks() -> None:
    pictures = draw_all(findings())
    assert len(pictures) == 8
    assert all(text.startswith("<svg") and text.count("<path") > 10 for text in pictures.values())


def test_written_numbers_can_be_read_again_and_a_quick_run_compares_with_them(tmp_path: Path) -> None:
    found = findings()
    judged = claims.judge_all(found)
    command.write(tmp_path / "page.md", judged, found, {"setting": "small.", "remarks": {}}, quick=False)
    links = re.findall(r"\]\(([^#)]+)\)", (tmp_path / "page.md").read_text())
    assert links and all((tmp_path / link).is_file() for link in links)
    kept = json.loads((tmp_path / "reproduction" / "claims.json").read_text())
    assert kept["claims"]["C1"]["parts"][0]["effect"] == pytest.approx(judged[0].parts[0].mean)
    final = pd.read_csv(tmp_path / "reproduction" / "final.csv")
    assert len(final) == found.points["last"].sum()
    numbers = tmp_path / "reproduction" / "final.csv"
    assert (
        command.agreement(found, numbers)
        == f"{len(final)} of {len(final)} final scores are the committed ones to six digits"
    )
    moved = findings(lambda row: gm_of(row) + 0.01 * (row["study"] == "sizes"))
    other = (final["study"] != "sizes").sum()
    assert command.agreement(moved, numbers).startswith(f"{other} of {len(final)} ")
    committed = tmp_path / "reproduction" / "claims.json"
    assert all("(as committed)" in line for line in command.told(judged, committed))
    other = claims.judge_all(findings(swapped("base/all", "latest/latest")))
    assert "(committed of this replicate: holds; of all: holds)" in command.told(other, committed)[0]


def test_quick_verdict_is_held_against_the_same_replicate_of_the_committed_ones(tmp_path: Path) -> None:
    """Offline merging ahead in two of three replicates: the first alone says that the claim holds, all together that it does not."""
    other = swapped("base/all", "latest/latest")
    found = findings(lambda row: gm_of(row) if row["replicate"] == REPLICATES[0] else other(row))
    judged = claims.judge_all(found)
    assert judged[0].verdict == NOT
    command.write(tmp_path / "page.md", judged, found, {"setting": "small.", "remarks": {}}, quick=False)
    quick = claims.judge_all(found.of_one_replicate())
    (line, *_) = command.told(quick, tmp_path / "reproduction" / "claims.json")
    assert line.startswith("C1 holds (as committed of this replicate; of all: does not hold): ")


def test_studies_that_never_ran_are_refused_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--no-run", "--out", str(tmp_path)]) == 2
    assert "run the study tuning first" in capsys.readouterr().err


@pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])
@pytest.mark.parametrize("name", [*TUNING, *claims.STUDIES])
def test_study_of_a_claim_is_valid(name: str, quick: bool) -> None:
    plan = yaml.safe_load((STUDIES / "reproduce.yaml").read_text())
    if quick and name in TUNING:
        assert name not in plan["quick"]
        return
    study = load_study(STUDIES / f"{name}.yaml", plan["quick"][name] if quick else [])
    assert study.name == name and study.storage.store == "runs/time_claims/store"
    replicates = {(str(cell.stream), cell.seed) for cell in study.cells}
    assert quick or name in TUNING or len(replicates) >= 3
