"""OPCM and RAPF: their laws, and the same by plain SVD in float64."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from merge_service.merge import merge
from merge_service.techniques.families import projections
from tests.merge_service import toys
from tests.merge_service.matrices import EXACT, SHAPES, matrix, shapes, svd

opcm_project = partial(projections.opcm_project, xp=np)
rapf_fuse = partial(projections.rapf_fuse, xp=np)


def plain_projection(previous: np.ndarray, tau: np.ndarray, alpha: float) -> np.ndarray:
    """OPCM with full U and V."""
    left, values, right = svd(previous, full=True)
    seen = left.T @ tau @ right
    np.fill_diagonal(seen, 0)
    block = int(np.argmax(np.cumsum(values) / values.sum() > alpha))
    seen[:block, :block] = 0
    return left @ seen @ right.T


def plain_fusion(old: np.ndarray, new: np.ndarray, b: float) -> np.ndarray:
    left, values, right = svd(old)
    was, now = np.diag(values) @ right.T, left.T @ new
    mask = np.minimum(abs(now - was) / abs(now - was).max() + b, 1)
    return left @ (now * mask + was * (1 - mask))


@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
@pytest.mark.parametrize("alpha", [0, 0.2, 0.5, 0.9])
def test_opcm_equals_the_projection_with_full_frames(shape: tuple, alpha: float) -> None:
    previous, tau = matrix(shape, 1), matrix(shape, 2)
    result = opcm_project(previous, tau, alpha)
    assert result.dtype == np.float32 and result.flags.c_contiguous
    if max(shape) < 1000:
        assert_allclose(result, plain_projection(previous, tau, alpha), **EXACT)
    assert abs((result * previous).sum()) < 1e-6
    assert np.linalg.norm(result) <= np.linalg.norm(tau) * (1 + 1e-6)


def test_opcm_looks_only_at_the_direction_of_what_was_merged() -> None:
    previous, tau = matrix((40, 16), 1), matrix((40, 16), 2)
    assert np.array_equal(opcm_project(previous * 8, tau), opcm_project(previous, tau))
    assert_allclose(opcm_project(previous, opcm_project(previous, tau)), opcm_project(previous, tau), **EXACT)


def test_opcm_drops_what_was_merged_before() -> None:
    previous = matrix((16, 40), 1)
    assert_allclose(opcm_project(previous, 3 * previous), np.zeros((16, 40)), **EXACT)


def test_opcm_passes_everything_while_nothing_is_merged() -> None:
    tau = matrix((16, 40))
    assert np.array_equal(opcm_project(np.zeros_like(tau), tau), tau)


def test_opcm_passes_directions_outside_the_numerical_rank() -> None:
    previous, tau = matrix((30, 20), 1, rank=4), matrix((30, 20), 2)
    left, _, right = svd(previous)
    left, right = left[:, :4], right[:, :4]
    own = np.diag(np.diag(left.T @ tau @ right))
    assert_allclose(opcm_project(previous, tau, 0), tau - left @ own @ right.T, **EXACT)
    assert_allclose(opcm_project(previous, tau, 1), tau - left @ left.T @ tau @ right @ right.T, **EXACT)


@pytest.mark.parametrize("b", [0, 0.5, 0.8])
def test_rapf_equals_plain_svd(b: float) -> None:
    old, new = matrix((24, 24), 1), matrix((24, 24), 2)
    assert_allclose(rapf_fuse(old, new, b), plain_fusion(old, new, b), **EXACT)


@shapes
def test_rapf_keeps_what_did_not_change_and_takes_all_at_b_of_one(shape: tuple) -> None:
    old, new = matrix(shape, 1), matrix(shape, 2)
    assert np.array_equal(rapf_fuse(old, old.copy(), 0.5), old)
    assert np.array_equal(rapf_fuse(old, new, 1), new)


@shapes
def test_rapf_never_leaves_the_stretch_between_old_and_new(shape: tuple) -> None:
    old, new = matrix(shape, 1), matrix(shape, 2)
    fused = rapf_fuse(old, new, 0.2)
    assert np.linalg.norm(fused - new) <= np.linalg.norm(old - new)
    assert np.linalg.norm(fused - old) <= np.linalg.norm(old - new) * (1 + 1e-6)


def test_rapf_passes_the_new_weight_outside_the_rank_of_the_old() -> None:
    old, new = matrix((30, 12), 1, rank=3), matrix((30, 12), 2)
    left = svd(old)[0][:, :3]
    fused = rapf_fuse(old, new, 0.3)
    assert fused.dtype == np.float32
    assert_allclose(fused - left @ (left.T @ fused), new - left @ (left.T @ new), **EXACT)
    assert np.array_equal(rapf_fuse(np.zeros_like(old), new, 0.3), new)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_torch_gives_what_numpy_gives(shape: tuple) -> None:
    one, other = matrix(shape, 0), matrix(shape, 1)
    ones, others = torch.from_numpy(one), torch.from_numpy(other)
    pairs = [
        (opcm_project(one, other), opcm_project(ones, others, xp=torch)),
        (rapf_fuse(one, other, 0.5), rapf_fuse(ones, others, 0.5, xp=torch)),
    ]
    for ours, theirs in pairs:
        assert theirs.dtype == torch.float32
        assert_allclose(theirs.numpy(), ours, **EXACT)


def test_opcm_of_models_without_weights_of_its_own_copies_and_averages(tmp_path: Path) -> None:
    def model(steps: int, mean: float) -> dict[str, np.ndarray]:
        return {"bn.num_batches_tracked": np.array(steps), "bn.running_mean": np.full(2, mean, np.float32)}

    for names in (["bn.num_batches_tracked"], ["bn.num_batches_tracked", "bn.running_mean"]):
        base, *experts = (
            toys.save(tmp_path / f"{at}.safetensors", {name: model(at, at)[name] for name in names})
            for at in (1, 2, 4)
        )
        merge("opcm", {}, base, experts, tmp_path / "o.safetensors")
        found = toys.load(tmp_path / "o.safetensors")
        assert found["bn.num_batches_tracked"] == 1
        assert found.get("bn.running_mean", np.full(2, 3)).tolist() == [3, 3]
