"""DOP and NUFILT: the minimum, and the released iterations, against torch's singular vectors, autograd and Adam."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from merge_service.techniques.families.subspaces import filtered, projected

RUNNING, NEW = np.random.default_rng(0).standard_normal((2, 7, 5)) * 0.01
MEAN = (RUNNING + NEW) / 2
PARAMS = {"weight": 0.2, "energy": 0.99999, "iterations": 60, "learning_rate": 1e-4}


def held(space: str) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """The two losses of a result, of the running and of the new model."""
    targets, kept = [torch.tensor(RUNNING), torch.tensor(NEW)], []
    for target in targets:
        left, values, right = torch.linalg.svd(target)
        count = int(torch.searchsorted(values.cumsum(0) / values.sum(), PARAMS["energy"]))
        kept.append((left[:, :count], torch.diag(values[:count]), right.T[:, :count]))

    def losses(found: torch.Tensor) -> list[torch.Tensor]:
        sums = []
        for target, (left, values, right) in zip(targets, kept):
            sides = [
                ((values @ left.T @ (found - target)) ** 2).sum(),
                (((found - target) @ right @ values) ** 2).sum(),
            ]
            sums.append({"both": sides[0] + sides[1], "left": sides[0], "right": sides[1]}[space])
        return sums

    return losses


def released(space: str, moving: bool) -> np.ndarray:
    """As the authors' code does it, in float64."""
    found, losses = torch.tensor(MEAN, requires_grad=True), held(space)
    adam, shares = torch.optim.Adam([found], lr=PARAMS["learning_rate"]), [0.8, 0.2]
    for _ in range(PARAMS["iterations"]):
        if moving:
            grads = [torch.autograd.grad(one, found)[0] / one.detach() for one in losses(found)]
            (aa, ab), (_, bb) = [[float((x * y).sum()) for y in grads] for x in grads]
            part = 0.999 if ab >= aa else 0.001 if ab >= bb else (bb - ab) / (aa + bb - 2 * ab)
            shares = [0.999 * shares[0] + 0.001 * part, 0.999 * shares[1] + 0.001 * (1 - part)]
        adam.zero_grad()
        sum(share * one for share, one in zip(shares, losses(found))).backward()
        adam.step()
    return found.detach().numpy()


@pytest.mark.parametrize("space", ["both", "left", "right"])
@pytest.mark.parametrize("solver", ["adam", "mgda"])
def test_iteration_of_dop_is_the_released_one(solver: str, space: str) -> None:
    got = projected(RUNNING, NEW, MEAN, params={**PARAMS, "solver": solver, "directions": space}, xp=np)
    np.testing.assert_allclose(got, released(space, solver == "mgda"), rtol=0, atol=1e-12)
    assert abs(got - MEAN).max() > 1e-3


@pytest.mark.parametrize("space", ["both", "left", "right"])
def test_minimum_of_dop_has_no_slope_and_equal_models_stay(space: str) -> None:
    slopes, losses = [], held(space)
    params = {**PARAMS, "solver": "exact", "directions": space}
    for at in (MEAN, projected(RUNNING, NEW, MEAN, params=params, xp=np)):
        leaf = torch.tensor(at, requires_grad=True)
        one, two = losses(leaf)
        slopes.append(float(torch.autograd.grad(0.8 * one + 0.2 * two, leaf)[0].abs().max()))
    assert slopes[1] < 1e-9 * slopes[0]
    for solver in ("exact", "adam", "mgda"):
        alone = projected(RUNNING, RUNNING, RUNNING, params={**params, "solver": solver}, xp=np)
        np.testing.assert_allclose(alone, RUNNING, rtol=0, atol=1e-15)


FILTER = {"kept": 2, "own": 1, "rank": 3, "iterations": 40, "learning_rate": 1e-2}
START = np.random.default_rng(1).normal(0, 0.02, (3, 5))


def released_filter() -> np.ndarray:
    """As the authors' code does it, in float64."""
    old, new = torch.tensor(RUNNING), torch.tensor(NEW)
    before, own = (torch.linalg.svd(one)[2].T for one in (old, new))
    before, own = before[:, : FILTER["kept"]], own[:, : FILTER["own"]]
    gate = torch.eye(5, dtype=torch.float64) - before @ before.T
    a = torch.tensor(START, requires_grad=True)
    b = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([a, b], lr=FILTER["learning_rate"])
    for _ in range(FILTER["iterations"]):
        found = old + new @ (gate + b @ a)
        loss = (((new - found) @ own) ** 2).sum() + (((old - found) @ before) ** 2).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return (old + new @ (gate + b @ a)).detach().numpy()


def nufilt(running: np.ndarray, new: np.ndarray, **params: object) -> np.ndarray:
    return filtered(running, new, START, params={**FILTER, "solver": "exact", **params}, xp=np)


def test_iteration_of_nufilt_is_the_released_one() -> None:
    np.testing.assert_allclose(nufilt(RUNNING, NEW, solver="adam"), released_filter(), rtol=0, atol=1e-12)


def test_nufilt_acts_as_the_new_expert_on_its_own_directions_and_as_the_running_model_on_those_kept() -> None:
    running, new = np.zeros((2, 5, 5))
    running[:2, :2], new[:, 2:] = RUNNING[:2, :2], NEW[:5, 2:]
    found = nufilt(running, new)
    np.testing.assert_allclose(found, running + new, atol=1e-15)  # other directions: nothing is filtered
    found, before = nufilt(RUNNING[:5], NEW[:5]), np.linalg.svd(RUNNING[:5])[2].T[:, :2]
    own = np.linalg.svd(NEW[:5])[2].T[:, :1]
    np.testing.assert_allclose(found @ before, RUNNING[:5] @ before, atol=1e-15)
    np.testing.assert_allclose(found @ own, NEW[:5] @ own, atol=1e-15)


@pytest.mark.parametrize("solver", ["exact", "adam"])
def test_nufilt_after_nothing_is_the_new_expert_and_adds_nothing_of_an_expert_that_did_not_move(
    solver: str,
) -> None:
    np.testing.assert_allclose(nufilt(RUNNING * 0, NEW, solver=solver, iterations=0), NEW, atol=1e-15)
    np.testing.assert_allclose(nufilt(RUNNING, NEW * 0, solver=solver), RUNNING, atol=1e-15)
