"""Model Stock: its factor by golden numbers, in closed form and where task vectors cancel out."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from merge_service.errors import TechniqueError
from merge_service.techniques.families.stock import mean_cosine, model_stock
from tests.merge_service.arrows import BASE, TAUS, TRIANGLE, unit


def stock(taus: np.ndarray, raw: bool = False) -> np.ndarray:
    total = sum(unit(tau) for tau in taus)
    t = model_stock(mean_cosine(total @ total, len(taus)), len(taus), "w", raw)
    return t * taus.mean(axis=0)


def test_model_stock_raw_gives_the_golden_vectors() -> None:
    total = sum(unit(tau) for tau in TAUS)
    cosine = mean_cosine(total @ total, 3)
    assert_allclose(cosine, -0.1641991, atol=1e-7)
    assert_allclose(model_stock(cosine, 3, "w", raw=True), -0.7334662, atol=1e-6)
    two = "0.174375 -1.054271 2 0.032917 -0.75 1.147239 -0.146354 -1.592968 0.986432 -0.147239"
    three = "0.194389 -1.427855 1.877756 0.25 -0.902805 1.117986 0.002756 -1.572145 0.495742 -0.179109"
    assert_allclose(BASE + stock(TAUS[:2], raw=True), np.array(two.split(), float), atol=1e-6)
    assert_allclose(BASE + stock(TAUS, raw=True), np.array(three.split(), float), atol=1e-6)


def test_model_stock_of_disagreeing_experts_stays_at_the_base() -> None:
    assert not stock(TAUS).any()
    assert not stock(np.eye(4)).any()


def test_model_stock_of_equal_experts_is_the_expert() -> None:
    taus = np.repeat(TAUS[:1], 3, axis=0)
    assert_allclose(stock(taus), TAUS[0], rtol=1e-12)
    assert model_stock(mean_cosine(1, 1), 1, "w") == 1


def test_model_stock_of_two_has_the_closed_form_and_grows_with_agreement() -> None:
    assert_allclose(model_stock(0.5, 2, "w"), 2 / 3)
    ts = [model_stock(cosine, 4, "w") for cosine in (-0.2, 0, 0.2, 0.6, 1)]
    assert ts == sorted(ts)
    assert ts[0] == 0 and ts[-1] == 1


def test_mean_cosine_is_the_mean_over_pairs_and_zero_vectors_count_as_zero() -> None:
    units = np.array([unit(tau) for tau in TAUS])
    total = units.sum(axis=0)
    pairs = units @ units.T
    assert_allclose(mean_cosine(total @ total, 3), (pairs.sum() - 3) / 6)
    assert_allclose(mean_cosine(total @ total, 5, zeros=2), (pairs.sum() - 3) / 20)
    assert mean_cosine(0, 3, zeros=3) == 0
    assert mean_cosine(1 + 1e-8, 2, zeros=1) == 0  # exactly: a rest would be a direction to the next fold


def test_model_stock_raw_of_task_vectors_that_cancel_out_is_refused_by_name() -> None:
    total = TRIANGLE.sum(axis=0)
    cosine = mean_cosine(total @ total, 3)
    with pytest.raises(TechniqueError, match="of w:"):
        model_stock(cosine, 3, "w", raw=True)
    assert model_stock(cosine, 3, "w") == 0
