"""What a report concludes, against numbers worked out by hand."""

import math
from typing import Any

import pandas as pd
import pytest

from pipeline.report.analysis import DESCRIBED, METRICS, last, pareto, recommend, spread, table


def point(group: str, seed: int = 0, t: int = 1, **found: Any) -> dict[str, Any]:
    described = dict.fromkeys(DESCRIBED, "") | {
        "name": group,
        "init": "base",
        "deploy": "all",
        "technique": "ties",
    }
    metrics = dict.fromkeys(METRICS, math.nan)
    return {**described, **metrics, "group": group, "seed": seed, "t": t, "task": "a", **found}


def frame(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(list(rows))


def test_last_is_the_newest_t_of_all_seeds_with_students_interval() -> None:
    rows = last(frame(point("a", 0, 1, gm=0.4), point("a", 1, 1, gm=0.6), point("a", 0, 2, gm=0.9)))
    (row,) = rows.to_dict("records")
    assert (row["t"], row["seeds"]) == (1, 2)
    assert row["gm"] == pytest.approx(0.5)
    assert row["gm_sd"] == pytest.approx(math.sqrt(0.02))
    assert row["gm_ci"] == pytest.approx(12.7062047 * 0.1)  # t(0.975, 1) times sd / sqrt(2)
    assert math.isnan(row["ka"])


def test_last_of_one_seed_has_no_interval_and_of_no_point_no_row() -> None:
    (row,) = last(frame(point("a", gm=0.4))).to_dict("records")
    assert row["gm"] == 0.4 and math.isnan(row["gm_sd"]) and math.isnan(row["gm_ci"])
    assert last(frame(point("a", gm=0.4)).iloc[:0]).empty


def test_pareto_marks_what_nothing_beats_and_both_of_two_equals() -> None:
    rows = frame(
        *(
            {"ka": ka, "zs": zs}
            for ka, zs in ((0.1, 0.9), (0.5, 0.5), (0.5, 0.5), (0.5, 0.4), (math.nan, 1.0))
        )
    )
    assert pareto(rows).tolist() == [True, True, True, False, False]


def two_by_two() -> pd.DataFrame:
    values = {("ties", "base"): 0.2, ("ties", "ema"): 0.6, ("average", "base"): 0.3, ("average", "ema"): 0.5}
    cells = [point(f"{t}-{i}", technique=t, init=i, gm=gm) for (t, i), gm in values.items()]
    return last(frame(*cells, point("none", technique="-", gm=0.99)))


def test_spread_compares_the_lines_of_the_table_both_ways() -> None:
    strategies, techniques = spread(two_by_two()).to_dict("records")
    assert strategies["range"] == pytest.approx((0.4 + 0.2) / 2)
    assert techniques["range"] == pytest.approx((0.1 + 0.1) / 2)
    assert (strategies["lines"], strategies["cells"], techniques["lines"]) == (2, 4, 2)


def test_spread_without_two_cells_in_a_line_is_missing() -> None:
    answer = spread(last(frame(point("a", gm=0.5), point("b", gm=0.6, budget="200 steps"))))
    assert answer["lines"].tolist() == [0, 0] and answer["range"].isna().all()


def test_table_has_a_line_per_technique_and_a_column_per_strategy() -> None:
    answer = table(two_by_two())
    assert answer.loc["ties", ("ema", "all")] == pytest.approx(0.6)
    assert answer.shape == (3, 2) and math.isnan(answer.loc["-", ("ema", "all")])


def test_recommendation_names_the_best_and_never_the_multitask_reference() -> None:
    advice = recommend(
        last(frame(point("reference", task="multitask", gm=0.9), point("a", gm=0.5), point("b", gm=0.4)))
    )
    assert advice is not None
    assert (advice.group, advice.runner_up, advice.separated) == ("a", "b", None)
    assert "Deploy a: GM 0.500 at t=1, 0.100 above b" in advice.sentence


@pytest.mark.parametrize(("noise", "separated"), [(0.001, True), (0.1, False)])
def test_recommendation_is_sure_only_where_intervals_are_apart(noise: float, separated: bool) -> None:
    seeds = [
        point(name, seed, gm=mean + noise * (seed - 1))
        for name, mean in (("a", 0.5), ("b", 0.4))
        for seed in range(3)
    ]
    advice = recommend(last(frame(*seeds)))
    assert advice is not None and advice.separated is separated


def test_recommendation_without_scores_is_none() -> None:
    assert recommend(last(frame(point("a")))) is None
