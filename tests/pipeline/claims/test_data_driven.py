"""What data buys: the study has what the questions compare, the rule is the page's, and the committed page follows from its rows."""

import csv
import json
import math
import re
from pathlib import Path
from statistics import fmean, stdev

import pandas as pd
import pytest
from scipy.stats import t as student

from pipeline.claims import data_driven_learned as learned
from pipeline.claims.data_driven import NAME, PAGE, STUDIES, claims_of, figure, page
from pipeline.claims.judge import EQUIVALENT, HOLDS, REFUTED, judge
from pipeline.claims.results import COLUMNS, METRICS, STREAM, Findings, _described
from pipeline.study.config import load_study

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / PAGE.with_suffix("")
RUN = {"steps_per_task": 60, "examples": 128, "measuring": 0.04, "machine": "a machine"}


def invented(
    gain: float, name: str = NAME, gaining: tuple[str, ...] = ("regmean", "lot", "fisher")
) -> Findings:
    """Every trajectory of a study; some techniques gain so much, orders differ a little."""
    rows = []
    for cell in load_study(ROOT / STUDIES[name]).cells:
        about = {
            "id": cell.id,
            "technique": cell.strategy.technique,
            "model": "tiny-clip-s",
            "stream": ["t"] * 5,
        }
        row = _described(about, cell)
        order = int(row["replicate"][-1])
        score = 0.3 + 0.01 * order + (gain + 1e-4 * order) * (row["technique"] in gaining)
        numbers = dict.fromkeys((*METRICS, *STREAM), score)
        rows.append({**row, **numbers, "study": name, "over_time": "", "plan": "p", "commit": "c"})
    return Findings(pd.DataFrame(rows, columns=list(COLUMNS)))


@pytest.mark.parametrize(("gain", "verdict"), [(0.05, HOLDS), (0.0, EQUIVALENT)])
def test_every_question_finds_its_trajectories_in_the_study_and_is_judged(gain: float, verdict: str) -> None:
    found = invented(gain)
    judged = judge(claims_of(found))
    assert [one.verdict for one in judged] == [verdict] * 5
    text = page(judged, found, RUN)
    assert text.count(f"**{verdict}**") >= 10 and "4.0%" in text and "nan" not in text
    assert figure(found).startswith("<svg")


def test_learned_merges_are_judged_by_their_own_study_and_the_budget_of_learning_is_said() -> None:
    found = invented(0.05, learned.NAME, ("adamerging", "tatr", "mats"))
    judged = judge(learned.claims_of(found))
    assert [one.verdict for one in judged] == [HOLDS, REFUTED, HOLDS, HOLDS, HOLDS]
    text = "\n".join(
        learned.section(judged, found, {"learning": 0.66, "measuring": 0.01, "learning_steps": 100})
    )
    assert "Learning took 66% of all GFLOPs" in text and "nan" not in text


def rows(name: str = NAME) -> list[dict[str, str]]:
    with (FOLDER / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


COMPARED = {
    "D1": ("base/all/regmean", "base/all/average"),
    "D2": ("latest/all/regmean", "latest/all/average"),
    "D3": ("latest/ema/regmean", "latest/ema/average"),
    "D4": ("ema/ema/regmean", "ema/ema/average"),
    "D5": ("ema/ema/regmean", "latest/latest/-"),
}


@pytest.mark.parametrize("key", COMPARED)
def test_committed_effect_and_interval_follow_from_the_rows(key: str) -> None:
    gm = {
        (f"{row['init']}/{row['deploy']}/{row['technique']}", row["replay"], row["replicate"]): float(
            row["gm"]
        )
        for row in rows()
    }
    orders = sorted({order for _, _, order in gm})
    one, other = COMPARED[key]
    apart = [
        fmean(gm[one, replay, order] - gm[other, replay, order] for replay in ("False", "True"))
        for order in orders
    ]
    kept = json.loads((FOLDER / "questions.json").read_text())[key]["parts"][0]
    assert kept["bears_on_the_verdict"] and kept["effect"] == pytest.approx(fmean(apart), abs=1e-9)
    half = student.ppf(0.975, len(orders) - 1) * stdev(apart) / math.sqrt(len(orders))
    assert kept["half_width"] == pytest.approx(half, rel=1e-6)
    shown = f"{fmean(apart):+.3f}".replace("0.", ".", 1)
    assert f"| {shown} ± " in (ROOT / PAGE).read_text()


LEARNED = {
    "L1": ("base/all/adamerging", "base/all/average"),
    "L2": ("base/all/supermerge", "base/all/adamerging"),
    "L3": ("base/all/tatr", "base/all/task_arithmetic"),
    "L4": ("base/all/mats", "base/all/average"),
    "L5": ("latest/ema/adamerging", "latest/ema/average"),
}


@pytest.mark.parametrize("key", LEARNED)
def test_committed_effect_of_the_second_study_follows_from_its_rows(key: str) -> None:
    gm = {
        (f"{row['init']}/{row['deploy']}/{row['technique']}", row["replicate"]): float(row["gm"])
        for row in rows(learned.NAME)
    }
    one, other = LEARNED[key]
    apart = [gm[one, order] - gm[other, order] for order in sorted({order for _, order in gm})]
    kept = json.loads((FOLDER / f"{learned.NAME}_questions.json").read_text())[key]["parts"][0]
    assert kept["bears_on_the_verdict"] and kept["effect"] == pytest.approx(fmean(apart), abs=1e-9)
    assert f"| {f'{fmean(apart):+.3f}'.replace('0.', '.', 1)} ± " in (ROOT / PAGE).read_text()


def test_numbers_of_the_advice_are_those_of_the_page() -> None:
    advice = (
        (ROOT / "docs" / "choosing.md")
        .read_text()
        .partition("## When is data worth it?")[2]
        .partition("\n## ")[0]
    )
    numbers = re.findall(r"[+-]\.\d{3}(?: ± \.\d{3})?", advice)
    assert len(numbers) == 9 and all(one in (ROOT / PAGE).read_text() for one in numbers)
