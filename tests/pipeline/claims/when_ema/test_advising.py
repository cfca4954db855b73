"""The advised weight is the fitted function, within the range of the fit."""

import numpy as np
import pytest

from pipeline.claims.when_ema.advising import fit, nearest_of


def expit(value: float) -> float:
    return 1 / (1 + np.exp(-value))


def test_fit_finds_the_function_that_made_the_weights() -> None:
    rng = np.random.default_rng(0)
    drift, share = 10 ** rng.uniform(-2, 0, 60), rng.uniform(0, 0.7, 60)
    weight = [expit(0.5 - 1.2 * np.log10(d) + 0.8 * s - 1.0) for d, s in zip(drift, share, strict=True)]
    found = fit(drift, share, weight)
    assert (found.constant, found.by_drift, found.by_share) == pytest.approx((-0.5, -1.2, 0.8))
    assert found.weight(0.1, 0.3) == pytest.approx(expit(-0.5 + 1.2 + 0.24))
    assert found.drifts == pytest.approx((drift.min(), drift.max()), rel=1e-5)


def test_weight_of_fine_tuning_is_taken_and_what_was_not_measured_is_known() -> None:
    found = fit([0.01, 0.1, 0.01, 0.1], [0.0, 0.0, 0.5, 0.5], [1.0, 0.5, 1.0, 1.0])
    assert 0 < found.weight(0.1, 0.0) < found.weight(0.01, 0.5) < 1
    assert found.covers(0.05, 0.2) and not found.covers(0.2, 0.2) and not found.covers(0.05, 0.6)
    for drift, share in ((0.0, 0.1), (0.1, 1.0), (0.1, -0.1)):
        with pytest.raises(ValueError, match="a drift is above 0"):
            found.weight(drift, share)


@pytest.mark.parametrize("shares", [[0.1, 0.1, 0.1], [0.0, 0.5, 1.0]], ids=["one share", "together"])
def test_fit_of_what_does_not_vary_is_refused(shares: list[float]) -> None:
    with pytest.raises(ValueError, match="must both vary"):
        fit([0.01, 0.1, 1.0], shares, [0.5, 0.6, 0.7])


def test_nearest_of_a_grid_takes_the_larger_of_two() -> None:
    assert nearest_of(0.65, [0.2, 0.5, 0.8]) == 0.8 and nearest_of(0.4, [0.2, 0.5, 0.8]) == 0.5
