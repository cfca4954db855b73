"""Gates and their statistics: held to definitions computed another way, and to what they must let pass and stop."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from merge_service.live import (
    Bounds,
    Judged,
    Margins,
    Medians,
    Paired,
    bootstrap,
    mcnemar,
    merge_gates,
    norms_out_of_bounds,
    outcome,
    score,
    solo,
)

PAIRS = [
    (0, 0, 50),
    (1, 0, 10),
    (0, 7, 300),
    (30, 12, 300),
    (150, 150, 300),
    (5, 1, 7212),
    (400, 390, 7212),
    (300, 0, 300),
]


@pytest.mark.parametrize("wins, losses, n", PAIRS)
def test_interval_of_a_difference_is_the_clopper_pearson_interval_of_wins_among_disagreements(
    wins: int, losses: int, n: int
) -> None:
    found = mcnemar(Paired(wins, losses, n))
    assert found.low <= found.difference <= found.high
    if wins + losses:
        exact = stats.binomtest(wins, wins + losses).proportion_ci(0.95, "exact")
        share = (wins + losses) / n
        assert found.low == pytest.approx(share * (2 * exact.low - 1), abs=1e-9)
        assert found.high == pytest.approx(share * (2 * exact.high - 1), abs=1e-9)
        clear = stats.binomtest(wins, wins + losses).pvalue < 0.05
        assert clear == (found.low > 0 or found.high < 0)


def test_bootstrap_interval_is_that_of_the_variance_of_paired_differences_and_repeats() -> None:
    sets = [[Paired(40, 30, 300)], [Paired(90, 20, 1000), Paired(10, 40, 200)]]
    found = bootstrap(sets, "ab" * 32)
    assert found == bootstrap(sets, "ab" * 32) != bootstrap(sets, "cd" * 32)
    mean = (10 / 300 + (70 / 1000 - 30 / 200) / 2) / 2
    assert found.difference == pytest.approx(mean)

    def variance(one: Paired) -> float:
        return (one.wins + one.losses) / one.n**2 - one.difference**2 / one.n

    spread = math.sqrt((variance(sets[0][0]) + (variance(sets[1][0]) + variance(sets[1][1])) / 4) / 4)
    assert found.low == pytest.approx(mean - 1.96 * spread, abs=0.1 * spread)
    assert found.high == pytest.approx(mean + 1.96 * spread, abs=0.1 * spread)


def answers(right: int, n: int = 400) -> tuple[np.ndarray]:
    return (np.arange(n) < right,)


def judged(name: str, **right: int) -> Judged:
    return Judged(name * 64, {dataset: answers(count) for dataset, count in right.items()})


def test_score_of_a_retrieval_set_is_the_mean_of_its_directions() -> None:
    assert score((np.array([True, False]), np.array([True, True, True, False]))) == float(Fraction(5, 8))


@pytest.mark.parametrize(
    "right, verdict",
    [(300, "pass"), (113, "pass"), (106, "fail"), (100, "fail"), (60, "fail")],
)
def test_expert_alone_must_gain_on_its_own_task(right: int, verdict: str) -> None:
    found = solo("animals", answers(right), answers(100), 0.02)
    assert (found.gate, found.verdict) == ("solo.animals", verdict)


def test_an_expert_of_few_samples_that_gains_by_luck_is_not_let_in() -> None:
    luck = solo("x", (np.array([True] * 3 + [False] * 7),), (np.zeros(10, bool),), 0.02)
    assert luck.difference == pytest.approx(0.3) and luck.low < 0 and luck.verdict == "fail"


def test_each_gate_stops_what_it_is_for() -> None:
    margins = Margins(accumulated=0.02, worst=0.10, held_out=0.03, drift=0.05)
    champion = judged("a", one=300, two=300, held=300)

    def verdicts(candidate: Judged, best: Judged = champion) -> dict[str, str]:
        found = merge_gates(candidate, champion, best, ["one", "two"], ["held"], margins)
        return {verdict.gate: verdict.verdict for verdict in found}

    assert set(verdicts(judged("b", one=310, two=300, held=299)).values()) == {"pass"}
    worst = verdicts(judged("b", one=220, two=400, held=300))
    assert worst["accumulated.worst.one"] == "fail" and worst["accumulated.mean"] == "pass"
    assert verdicts(judged("b", one=270, two=270, held=300))["accumulated.mean"] == "fail"
    assert verdicts(judged("b", one=300, two=300, held=250))["held_out.mean"] == "fail"
    best = judged("c", one=340, two=340, held=340)
    drifted = verdicts(judged("b", one=298, two=298, held=298), best)
    assert drifted["drift"] == "fail" and drifted["accumulated.mean"] == "pass"
    assert outcome(merge_gates(champion, champion, champion, [], [], margins)) == "pass"


def test_what_cannot_be_told_is_undecided() -> None:
    few = Judged("b" * 64, {"one": answers(4, 12)}), Judged("a" * 64, {"one": answers(7, 12)})
    found = merge_gates(*few, few[1], ["one"], [], Margins())
    assert {one.verdict for one in found} == {"undecided"} and outcome(found) == "undecided"


def test_norms_are_bounded_by_medians_of_what_was_accepted() -> None:
    usual = Medians()
    for norms in ({"norm": 1.0, "norm.text": 0.5}, {"norm": 3.0, "norm.text": 0.6}, {"norm": 2.0}):
        usual.add(norms)
    reference = usual.found()
    assert usual.count == 3 and reference == {"norm": 2.0, "norm.text": 0.55}
    bounds = Bounds()
    assert norms_out_of_bounds({"norm": 8.0, "norm.text": 0.14}, reference, bounds) == ()
    assert norms_out_of_bounds({"norm": 8.1, "norm.text": 0.13}, reference, bounds) == (
        "geometry.norm",
        "geometry.norm.text",
    )
