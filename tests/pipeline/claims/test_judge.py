"""The rule of the verdicts: by hand, by laws that hold for any numbers, and by how often it errs in invented studies."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.claims.judge import (
    ALPHA,
    EQUIVALENT,
    HOLDS,
    REFUTED,
    UNDECIDED,
    VERDICTS,
    Claim,
    Part,
    decide,
    judge,
    kept_order,
    shares,
    verdicts,
)

numbers = st.floats(-1, 1).map(lambda value: round(value, 4))
samples = st.lists(numbers, min_size=2, max_size=8)


def part(*values: float, key: str = "a", **more: Any) -> Part:
    return Part(key, "says", pd.Series(values), **more)


def claim(*parts: Part) -> Claim:
    return Claim("C0", "claim", "paper", parts)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.02, 0.03, 0.04), HOLDS),
        ((-0.02, -0.03, -0.04), REFUTED),
        ((0.001, 0.002, 0.003), EQUIVALENT),
        ((-0.0041, -0.0035, -0.0038), EQUIVALENT),
        ((-0.01, 0.05, 0.05), UNDECIDED),
        ((0.0001, 0.0121, -0.0119), UNDECIDED),
        ((0.4,), UNDECIDED),
        ((0.4, 0.4, 0.4), UNDECIDED),
    ],
    ids=["above", "below", "small", "small and sure", "wide", "nothing, wide", "one replicate", "no spread"],
)
def test_part_is_judged_by_where_its_interval_lies(values: Any, verdict: str) -> None:
    assert part(*values).alone == verdict


def test_bar_moves_the_verdict_and_margin_zero_leaves_no_equivalence() -> None:
    near = (-0.004, -0.005, -0.006)
    assert part(*near).alone == EQUIVALENT
    assert part(*near, margin=0).alone == REFUTED
    assert part(*near, bar=-0.01, margin=0).alone == HOLDS


def test_interval_is_students_over_replicates_and_missing_for_one() -> None:
    assert part(0.4, 0.6).half_width() == pytest.approx(12.7062047 * 0.1)
    assert math.isnan(part(0.4).half_width())


@settings(deadline=None, max_examples=30)
@given(samples, st.sampled_from([0.0, 0.01, 0.1]), st.sampled_from([-0.01, 0.0, 0.5]))
def test_verdict_of_one_part_is_what_its_interval_says(
    values: list[float], margin: float, bar: float
) -> None:
    one = part(*values, margin=margin, bar=bar)
    low, high = one.mean - one.half_width(), one.mean + one.half_width()
    edges = (low - bar, high - bar, low - bar + margin, high - bar - margin)
    if math.isnan(low) or min(map(abs, edges)) < 1e-9:
        return  # no interval, or one that ends at a bar to the last bits
    inside = margin > 0 and bar - margin < low and high < bar + margin
    assert one.alone == (
        EQUIVALENT if inside else HOLDS if low > bar else REFUTED if high < bar else UNDECIDED
    )


@settings(deadline=None, max_examples=30)
@given(samples)
def test_what_speaks_for_a_claim_speaks_as_strongly_against_its_opposite(values: list[float]) -> None:
    opposite = {HOLDS: REFUTED, REFUTED: HOLDS, EQUIVALENT: EQUIVALENT, UNDECIDED: UNDECIDED}
    assert part(*(-value for value in values)).alone == opposite[part(*values).alone]


@settings(deadline=None, max_examples=30)
@given(st.lists(samples, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_verdicts_do_not_depend_on_the_order_of_parts_and_company_only_weakens_them(
    several: list[list[float]], random: Any
) -> None:
    parts = [part(*values) for values in several]
    found, p = verdicts(parts)
    places = list(range(len(parts)))
    random.shuffle(places)
    again, p_again = verdicts([parts[place] for place in places])
    assert dict(zip(places, zip(again, p_again, strict=True), strict=True)) == dict(
        enumerate(zip(found, p, strict=True))
    )
    for one, verdict, value in zip(parts, found, p, strict=True):
        (alone,), (p_alone,) = verdicts([one])
        assert value >= p_alone
        if one.alone == UNDECIDED:
            assert verdict == UNDECIDED
        assert (verdict == UNDECIDED) == (value > ALPHA)
        assert alone == one.alone


def test_holm_asks_the_surest_for_most_and_stops_at_the_first_that_is_not_sure() -> None:
    """Two-sided p of means with five degrees of freedom: .001, .02 and .03 of three: times 3, times 2, times 1, and never
    decreasing.
    """
    t = [6.8688, 3.3649, 2.9972]  # two-sided p of Student's t with 5 degrees of freedom: tables
    code, p = decide(t, 1.0, 5, 0.0, 0.0)
    assert p == pytest.approx([0.003, 0.04, 0.04], abs=2e-4)
    assert [VERDICTS[one] for one in code] == [HOLDS, HOLDS, HOLDS]
    code, p = decide([6.8688, 2.9972, 2.9972], 1.0, 5, 0.0, 0.0)
    assert p == pytest.approx([0.003, 0.0602, 0.0602], abs=2e-4)
    assert [VERDICTS[one] for one in code] == [HOLDS, UNDECIDED, UNDECIDED]


CLEAR, AGAINST, NONE, WIDE = (0.2, 0.21, 0.22), (-0.2, -0.21, -0.22), (0.0, 0.0002, -0.0002), (-0.3, 0.2, 0.3)


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        ([CLEAR, CLEAR], HOLDS),
        ([CLEAR, WIDE], UNDECIDED),
        ([WIDE, NONE, CLEAR], EQUIVALENT),
        ([AGAINST, NONE, WIDE, CLEAR], REFUTED),
    ],
    ids=["all", "one is open", "one is none", "one is against"],
)
@pytest.mark.parametrize("turned", [False, True], ids=["as it stands", "turned round"])
def test_claim_needs_all_of_its_parts_in_any_order(parts: list[Any], verdict: str, turned: bool) -> None:
    made = [part(*values, key=str(place)) for place, values in enumerate(parts)]
    made += [part(*AGAINST, key="beside", beside=True)]
    (one,) = judge([claim(*(made[::-1] if turned else made))])
    assert one.verdict == verdict
    assert (
        one.settled_by.key
        == str(next(place for place, values in enumerate(parts) if one.verdict == part(*values).alone))
        or verdict == HOLDS
    )


def test_least_certain_part_settles_a_claim_that_holds_and_the_surest_one_that_fails() -> None:
    (one,) = judge([claim(part(*CLEAR, key="sure"), part(0.02, 0.03, 0.04, key="less"))])
    assert (one.verdict, one.settled_by.key) == (HOLDS, "less")
    (one,) = judge([claim(part(*AGAINST, key="sure"), part(-0.02, -0.03, -0.04, key="less"))])
    assert (one.verdict, one.settled_by.key) == (REFUTED, "sure")


def test_ranks_that_agree_in_all_replicates_have_the_spread_of_their_steps() -> None:
    same = part(1.0, 1.0, 1.0, 1.0, 1.0, margin=0, step=0.25)
    assert same.error == pytest.approx(0.25 / math.sqrt(12 * 5))
    assert same.alone == HOLDS and part(0.0, 0.0, 0.0, margin=0, step=0.25).alone == UNDECIDED
    assert part(0.1, 0.9, margin=0, step=0.25).error == part(0.1, 0.9).error


# --- how often the rule errs ---------------------------------------------------------------------------------------------

STUDIES, REPLICATES, MARGIN = 5_000, 5, 0.01
TRUTHS = {
    "all zero": [0.0] * 8,
    "all at the margin": [MARGIN] * 8,
    "a mixture": [0.0, 0.0, MARGIN, -MARGIN, 0.15, -0.15, 0.004, 0.02],
    "most are clear": [0.2] * 6 + [0.0, 0.0],
}


def studied(effects: list[float], spread: float, shared: float) -> np.ndarray:
    """Verdict codes of `STUDIES` invented pages; `shared` is the part of each replicate's luck that all comparisons have in common."""
    rng = np.random.default_rng(7)
    shape = (STUDIES, REPLICATES, len(effects))
    luck = math.sqrt(1 - shared) * rng.standard_normal(shape) + math.sqrt(shared) * rng.standard_normal(
        (STUDIES, REPLICATES, 1)
    )
    values = np.asarray(effects) + spread * luck
    error = values.std(axis=1, ddof=1) / math.sqrt(REPLICATES)
    return decide(values.mean(axis=1), error, REPLICATES - 1, 0.0, MARGIN)[0]


def wrong(codes: np.ndarray, effects: list[float]) -> np.ndarray:
    truth = np.asarray(effects)
    return (
        ((codes == VERDICTS.index(HOLDS)) & (truth <= 0))
        | ((codes == VERDICTS.index(REFUTED)) & (truth >= 0))
        | ((codes == VERDICTS.index(EQUIVALENT)) & (abs(truth) >= MARGIN))
    )


@pytest.mark.parametrize("shared", [0.0, 0.8], ids=["apart", "alike"])
@pytest.mark.parametrize("spread", [0.002, 0.01, 0.04], ids=["sharp", "middling", "blurred"])
@pytest.mark.parametrize("effects", TRUTHS.values(), ids=TRUTHS)
def test_any_verdict_of_a_page_is_wrong_in_one_page_of_twenty_at_most(
    effects: list[float], spread: float, shared: float
) -> None:
    pages = wrong(studied(effects, spread, shared), effects).any(axis=-1).mean()
    assert pages <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / STUDIES)


def test_true_zero_reads_as_holding_or_as_refuted_in_one_case_of_forty_each() -> None:
    """One comparison with a true effect of nothing and no margin: the coin of the old rule gave one of the two in every case."""
    rng = np.random.default_rng(3)
    values = 0.01 * rng.standard_normal((100_000, REPLICATES, 1))
    code, _ = decide(
        values.mean(axis=1), values.std(axis=1, ddof=1) / math.sqrt(REPLICATES), REPLICATES - 1, 0.0, 0.0
    )
    rates = {verdict: float((code == place).mean()) for place, verdict in enumerate(VERDICTS)}
    assert rates[HOLDS] == pytest.approx(ALPHA / 2, abs=0.002)
    assert rates[REFUTED] == pytest.approx(ALPHA / 2, abs=0.002)
    assert rates[UNDECIDED] == pytest.approx(1 - ALPHA, abs=0.002)


def test_sharp_study_finds_a_true_zero_equivalent_and_an_effect_of_two_margins_to_hold() -> None:
    codes = studied([0.0, 2 * MARGIN], 0.002, 0.0)
    assert (codes[:, 0] == VERDICTS.index(EQUIVALENT)).mean() > 0.99
    assert (codes[:, 1] == VERDICTS.index(HOLDS)).mean() > 0.99


# --- shares and orders ---------------------------------------------------------------------------------------------------


def test_variance_is_shared_out_as_in_a_two_way_analysis_by_hand() -> None:
    table = pd.DataFrame({"r": ["a", "a", "b", "b"], "c": ["x", "y", "x", "y"], "gm": [0.0, 2.0, 4.0, 10.0]})
    found = shares(table, "gm", "r", "c")  # grand 4; rows 1, 7: 36; columns 2, 6: 16; cells 0,2,4,10: 56
    assert found == pytest.approx({"r": 36 / 56, "c": 16 / 56, "interplay": 4 / 56})
    with pytest.raises(ValueError, match="gaps"):
        shares(table.iloc[:3], "gm", "r", "c")
    with pytest.raises(ValueError, match="does not vary"):
        shares(table.assign(gm=1.0), "gm", "r", "c")


def test_kept_order_counts_pairs_within_groups_alone() -> None:
    short, long = pd.Series({"a": 1, "b": 2, "c": 3, "d": 9}), pd.Series({"a": 2, "b": 1, "c": 3, "d": -9})
    assert kept_order(short, long, [["a", "b", "c"]]) == pytest.approx(1 / 3)  # ab turned, ac and bc kept
    assert kept_order(short, long, [["a", "b"], ["c", "d"]]) == -1
    assert kept_order(short, short, [["a", "b"], ["c", "d"]]) == 1
    assert kept_order(short, long * 0, [["a", "b"]]) == 0
    with pytest.raises(ValueError, match="two members"):
        kept_order(short, long, [["a"], ["b"]])
