"""What README and the page on choosing say of our own studies is what the committed numbers show."""

import json
import re
from collections import Counter
from functools import cache
from typing import Any

import pandas as pd
import pytest

from tests.world import ROOT

DOCS = ROOT / "docs"
REPRODUCTION = DOCS / "reproduction"


@cache
def verdicts(file: str) -> Any:
    """A committed file of verdicts, relative to docs/."""
    return json.loads((DOCS / file).read_text())


@cache
def rows(name: str) -> pd.DataFrame:
    return pd.read_csv(REPRODUCTION / "rows" / f"{name}.csv")


def text(page: str) -> str:
    """A page with every run of white space as one space, so that lines may break anywhere."""
    return " ".join((ROOT / page).read_text().split())


def effect(file: str, claim: str, key: str, signed: bool = True) -> str:
    """An effect with its interval, as pages write it: +.003 ± .008."""
    part = next(one for one in verdicts(file)[claim]["parts"] if one["key"] == key)
    return f"{short(part['effect'], '+' if signed else '')} ± {short(part['half_width'])}"


def short(value: float, sign: str = "", digits: int = 3) -> str:
    """Without the zero before the point."""
    return re.sub(r"\b0\.", ".", f"{value:{sign}.{digits}f}")


def over_time(init: str, deploy: str, technique: str) -> list[float]:
    """Mean GM over replicates at each t, with replay."""
    found = rows("cells")
    one = found[
        (found.init == init) & (found.deploy == deploy) & (found.technique == technique) & found.replay
    ]
    assert len(one) == 5, (init, deploy, technique, len(one))
    return pd.DataFrame([list(map(float, line.split())) for line in one.over_time]).mean().tolist()


def test_counts_of_verdicts_are_those_of_the_claims() -> None:
    counted = Counter(one["verdict"] for one in verdicts("reproduction/claims.json").values())
    said = {name: int(number) for name, number in re.findall(r"^- (\w+) (\d):", (ROOT / "README.md").read_text(), re.MULTILINE)}  # fmt: skip
    assert said == counted and sum(said.values()) == len(verdicts("reproduction/claims.json"))


def test_page_on_choosing_gives_every_claim_its_verdict() -> None:
    said = re.findall(r"\[(\w+)\]\(reproduction\.md#(c\d)\)", (DOCS / "choosing.md").read_text())
    assert {name.upper(): verdict for verdict, name in said} == {
        name: one["verdict"] for name, one in verdicts("reproduction/claims.json").items()
    }
    assert len(said) == len(verdicts("reproduction/claims.json"))


def test_figures_over_time_are_those_of_the_study() -> None:
    offline, tuned, served = (
        over_time("base", "all", "average"), over_time("latest", "latest", "-"), over_time("ema", "ema", "average"),
    )  # fmt: skip
    base, two = short(tuned[0], digits=2), [short(one[-1], digits=2) for one in (tuned, served)]
    ends = short(offline[-1], digits=2)
    readme = text("README.md")
    assert offline[0] == tuned[0] == served[0] and two[0] == two[1]
    assert f"rise from {base} to {two[0]}, offline merging ends at {ends}" in readme
    assert (
        f"({ends}; the base has {base}). The leading strategies that account for time reach {two[0]}"
        in readme
    )


def test_both_tables_of_the_demo_end_alike() -> None:
    readme, choosing = (ROOT / "README.md").read_text(), (DOCS / "choosing.md").read_text()
    ends = {
        name: last.split(" / ")
        for name, last in re.findall(r"^\| `([\w-]+)` \|.*\| ([.\d]+ / [.\d]+ / [.\d]+) \|$", readme, re.MULTILINE)
    }  # fmt: skip
    said = re.findall(r"^\| `([\w-]+)` \| ([.\d]+) \| ([.\d]+) \| ([.\d]+) \|$", choosing, re.MULTILINE)
    assert len(ends) == 7 and len(said) == 6
    for name, *scores in said:
        assert ends[name] == scores, name


def test_nothing_without_replay_ends_a_point_above_the_base() -> None:
    for name in ("no_replay", "offline"):
        found = rows(name)
        base = rows("no_replay").query("init == 'base' and deploy == 'base'").gm.mean()
        ends = found[~found.replay].groupby(["init", "deploy", "technique"]).gm.mean()
        assert ends.max() < base + 0.01, name


def test_best_factors_are_those_of_the_tuning() -> None:
    found = rows("tuning").query("init == 'ema' and deploy == 'ema'")

    def by(technique: str, key: str) -> pd.Series:
        one = found[found.technique == technique]
        return pd.Series(one.gm.tolist(), index=[json.loads(line)[key] for line in one.params])

    choosing = text("docs/choosing.md")
    assert f"its best weight was {short(by('average', 'weight').idxmax(), digits=1)} |" in choosing
    scales = by("task_arithmetic", "scale")
    assert (
        f"on ten tasks was {short(scales.idxmax(), digits=2)}, and {short(scales.idxmin(), digits=1)} was the worst"
        in choosing
    )


@pytest.mark.parametrize(
    ("file", "claim", "key", "says"),
    [
        ("questions", "D1", "offline", "{} in GM where experts were trained apart"),
        ("questions", "D2", "chain", "{} where all experts of a chain are served"),
        ("questions", "D3", "fold", "{} as a moving average"),
        ("questions", "D4", "start", "{} as the start of the next expert"),
        ("questions", "D1", "base → all fisher above base → all average", "`fisher` beside averaging: {} where experts were trained apart"),
        ("data_driven_learned_questions", "L1", "L1", "AdaMerging beside averaging gained {} in GM"),
        ("data_driven_learned_questions", "L1", "L1_zs", "ZS {}"),
        ("data_driven_learned_questions", "L1", "L1_ka", "KA {}"),
    ],
)  # fmt: skip
def test_gains_of_data_are_those_of_the_study(file: str, claim: str, key: str, says: str) -> None:
    assert says.format(effect(f"data_driven/{file}.json", claim, key)) in text("docs/choosing.md")
