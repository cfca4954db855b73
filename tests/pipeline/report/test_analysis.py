"""The conclusions of a report, compared with numbers computed by hand."""

import math
from typing import Any

import pandas as pd
import pytest

from pipeline.report.analysis import METRICS, coincident, forgotten, last, pareto, recommend, spread


def point(group: str, seed: int = 0, t: int = 1, **found: Any) -> dict[str, Any]:
    described = {
        "slice": "all",
        "choice": "ties",
        "strategy": "base → all",
        "name": group,
        "init": "base",
        "deploy": "all",
        "technique": "ties",
        "mixture": "no replay",
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


def two_by_two(**more: Any) -> list[dict[str, Any]]:
    values = {("ties", "base"): 0.2, ("ties", "ema"): 0.6, ("average", "base"): 0.3, ("average", "ema"): 0.5}
    return [
        point(f"{t}-{i}", technique=t, choice=t, init=i, strategy=f"{i} → all", **{"gm": gm, **more})
        for (t, i), gm in values.items()
    ]


def test_spread_compares_the_lines_of_the_table_both_ways() -> None:
    rows = last(frame(*two_by_two(), point("none", technique="-", choice="-", gm=0.99)))
    strategies, techniques = spread(rows).to_dict("records")
    assert strategies["range"] == pytest.approx((0.4 + 0.2) / 2)
    assert techniques["range"] == pytest.approx((0.1 + 0.1) / 2)
    assert (strategies["lines"], strategies["cells"], techniques["lines"]) == (2, 4, 2)


def test_spread_takes_strategies_and_techniques_from_the_same_settings_only() -> None:
    """Strategies that were tried with replay and techniques without it cannot be compared."""
    replayed = [
        point(f"r{s}", slice="replay", strategy=s, gm=gm)
        for s, gm in (("base → all", 0.1), ("ema → ema", 0.9))
    ]
    plain = [
        point(f"p{t}", slice="no replay", choice=t, technique=t, gm=gm)
        for t, gm in (("ties", 0.2), ("average", 0.3))
    ]
    answer = spread(last(frame(*replayed, *plain)))
    assert answer["lines"].tolist() == [0, 0] and answer["range"].isna().all()
    both = spread(last(frame(*replayed, *plain, *two_by_two(slice="full"))))
    assert both.set_index("over").loc["strategies", "range"] == pytest.approx(0.3)


def test_lines_that_hide_each_other_are_named() -> None:
    rows = frame(
        *(
            point(g, t=t, gm=gm)
            for g, gms in (("a", (0.1, 0.2)), ("b", (0.1, 0.2)), ("c", (0.1, 0.3)))
            for t, gm in enumerate(gms)
        )
    )
    assert coincident(rows, ["gm"]) == [["a", "b"]]


def test_forgetting_per_task_has_the_mean_that_results_report() -> None:
    seen = {0: (0.99, 0.99, 0.99), 1: (0.8, 0.1, 0.0), 2: (0.9, 0.7, 0.0), 3: (0.5, 0.6, 1.0)}
    scores = frame(
        *(
            {
                "group": "g",
                "trajectory": "g",
                "t": t,
                "dataset": name,
                "arrival": float(arrival),
                "score": row[arrival - 1],
            }
            for t, row in seen.items()
            for arrival, name in ((1, "a"), (2, "b"), (3, "c"))
        )
    )
    rows = forgotten(scores, frame(*({"trajectory": "g", "t": t, "task": f"task {t}"} for t in range(4))))
    assert rows["task"].tolist() == ["task 1", "task 2"]
    assert rows["forgetting"].tolist() == pytest.approx([0.9 - 0.5, 0.7 - 0.6])


def test_front_of_a_cost_prefers_less_of_it() -> None:
    rows = frame(*({"gm": gm, "gflops": cost} for gm, cost in ((0.5, 1.0), (0.6, 2.0), (0.5, 2.0))))
    assert pareto(rows, "gm", "gflops", cheap=True).tolist() == [True, True, False]


def test_seeds_with_equal_scores_have_no_interval_unless_nothing_is_trained() -> None:
    seeds = [point(name, seed, gm=gm, mixture=mixture) for name, gm, mixture in (("a", 0.5, "no replay"), ("zero_shot", 0.4, "-")) for seed in range(3)]  # fmt: skip
    rows = last(frame(*seeds))
    found = rows.set_index("group")
    assert math.isnan(found.loc["a", "gm_ci"]) and found.loc["zero_shot", "gm_ci"] == 0
    advice = recommend(rows)
    assert advice is not None and advice.separated is None
    assert advice.sentence.endswith("above zero_shot; seeds with equal scores cannot say how sure.")


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
