"""Iso-C, Iso-CTS, OPCM and RAPF: their laws, and the same by plain SVD in float64."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from merge_service.techniques.matrices import (
    isotropic,
    isotropic_task_specific,
    opcm_project,
    rapf_fuse,
    task_dimensions,
)

SHAPES = [(24, 24), (40, 16), (16, 40), (5000, 6), (6, 5000), (1, 7), (7, 1), (1, 1)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
EXACT = {"rtol": 0, "atol": 3e-6}


def matrix(shape: tuple[int, int], seed: int = 0, rank: int | None = None) -> np.ndarray:
    """A float32 task vector of norm 1; of that rank, up to its own rounding, where given."""
    draw = np.random.default_rng(seed)
    if rank is None:
        full = draw.standard_normal(shape)
    else:
        full = draw.standard_normal((shape[0], rank)) @ draw.standard_normal((rank, shape[1]))
    return (full / np.linalg.norm(full)).astype(np.float32)


def rotation(size: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def spectrum(array: np.ndarray) -> np.ndarray:
    return np.linalg.svd(array.astype(float), compute_uv=False)


def svd(array: np.ndarray, full: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    left, values, right = np.linalg.svd(array.astype(float), full_matrices=full)
    return left, values, right.T


def plain_isotropic(total: np.ndarray) -> np.ndarray:
    left, values, right = svd(total)
    return values.mean() * left @ right.T


def plain_task_specific(taus: list, fraction: float) -> np.ndarray:
    """Iso-CTS step by step: common directions, each task's own outside them, both sides made orthonormal."""
    left, values, right = svd(sum(tau.astype(float) for tau in taus))
    own = task_dimensions(values.size, len(taus), fraction)
    common = values.size - own * len(taus)
    lefts, rights, kept = [left[:, :common]], [right[:, :common]], [values[:common]]
    for tau in taus:
        u, s, v = svd(tau - lefts[0] @ lefts[0].T @ tau)
        lefts.append(u[:, :own])
        kept.append(s[:own])
        rights.append(v[:, :own])
    u, _, v = svd(np.hstack(lefts))
    x, _, y = svd(np.hstack(rights))
    return np.concatenate(kept).mean() * (u @ v.T) @ (x @ y.T).T


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


@shapes
def test_iso_c_equals_plain_svd(shape: tuple) -> None:
    total = matrix(shape)
    result = isotropic(total)
    assert result.dtype == np.float32 and result.flags.c_contiguous
    assert_allclose(result, plain_isotropic(total), **EXACT)


@shapes
def test_iso_c_keeps_the_nuclear_norm_and_makes_singular_values_equal(shape: tuple) -> None:
    total = matrix(shape)
    values = spectrum(isotropic(total))
    assert_allclose(values.sum(), spectrum(total).sum(), rtol=1e-6)
    assert_allclose(values, values[0], rtol=1e-5)


def test_iso_c_follows_rotations_of_either_side_and_scale() -> None:
    total = matrix((40, 16))
    turn, other = rotation(40, 1), rotation(16, 2)
    expected = 1e-4 * turn @ isotropic(total) @ other
    assert_allclose(1e4 * isotropic(1e-4 * turn @ total @ other), 1e4 * expected, **EXACT)


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_iso_c_of_very_small_and_very_large_weights_is_exact(scale: float) -> None:
    total = matrix((16, 40))
    assert np.array_equal(isotropic(total * np.float32(scale)), isotropic(total) * np.float32(scale))


def test_iso_c_leaves_out_directions_that_are_only_rounding() -> None:
    total = matrix((60, 40), rank=3)
    values = spectrum(isotropic(total))
    assert_allclose(values[:3], spectrum(total)[:3].mean(), rtol=1e-5)
    assert values[3] < 1e-5 * values[0]


def test_zero_matrices_give_zeros() -> None:
    zero = np.zeros((6, 4), np.float32)
    assert not isotropic(zero).any()
    assert not isotropic_task_specific(zero, [zero, zero], 2, 0.5).any()


@pytest.mark.parametrize("shape", [(24, 24), (40, 24), (24, 40), (5000, 12)], ids=str)
@pytest.mark.parametrize("fraction", [0.8, 0.5, 0.0])
def test_iso_cts_equals_plain_svd(shape: tuple, fraction: float) -> None:
    taus = [matrix(shape, seed) for seed in range(3)]
    result = isotropic_task_specific(sum(taus), iter(taus), 3, fraction)
    assert result.dtype == np.float32
    assert_allclose(result, plain_task_specific(taus, fraction), **EXACT)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)], ids=str)
def test_iso_cts_makes_singular_values_equal_in_any_order_of_experts(shape: tuple) -> None:
    taus = [matrix(shape, seed) for seed in range(4)]
    result = isotropic_task_specific(sum(taus), taus, 4)
    assert_allclose(spectrum(result), spectrum(result)[0], rtol=1e-5)
    assert_allclose(isotropic_task_specific(sum(taus), taus[::-1], 4), result, **EXACT)


def test_iso_cts_holds_one_task_vector_at_a_time() -> None:
    taus = [matrix((24, 40), seed) for seed in range(4)]

    def lent():
        array = np.empty_like(taus[0])
        for tau in taus:
            array[:] = tau
            yield array
            array[:] = np.nan

    expected = isotropic_task_specific(sum(taus), taus, 4)
    assert np.array_equal(isotropic_task_specific(sum(taus), lent(), 4), expected)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)], ids=str)
def test_iso_cts_of_one_expert_is_iso_c(shape: tuple) -> None:
    tau = matrix(shape)
    assert_allclose(isotropic_task_specific(tau, [tau], 1), isotropic(tau), **EXACT)


def test_iso_cts_of_more_experts_than_directions_is_iso_c() -> None:
    taus = [matrix((12, 4), seed) for seed in range(9)]
    assert np.array_equal(isotropic_task_specific(sum(taus), taus, 9), isotropic(sum(taus)))


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)], ids=str)
def test_iso_cts_of_low_rank_experts_adds_no_rounding(shape: tuple) -> None:
    taus = [matrix(shape, seed, rank=2) for seed in range(4)]
    result = isotropic_task_specific(sum(taus), taus, 4)
    assert_allclose(result, isotropic(sum(taus)), **EXACT)
    assert spectrum(result)[8] < 1e-5 * spectrum(result)[0]


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)], ids=str)
def test_iso_cts_counts_directions_of_equal_experts_once(shape: tuple) -> None:
    tau = matrix(shape)
    values = spectrum(isotropic_task_specific(tau + tau, [tau, tau], 2))
    assert_allclose(values[:36], values[0], rtol=1e-5)
    assert values[36] < 1e-5 * values[0]


def test_iso_cts_of_task_vectors_that_cancel_out_keeps_their_own_directions() -> None:
    tau = matrix((24, 16))
    values = spectrum(isotropic_task_specific(tau - tau, [tau, -tau], 2, 0.5))
    assert values[0] > 0
    assert np.isfinite(values).all()


def test_task_dimensions_share_what_the_common_part_leaves() -> None:
    assert task_dimensions(768, 8, 0.8) == 19
    assert task_dimensions(768, 2000, 0.8) == 0
    assert task_dimensions(3, 2, 0.0) == 1  # rounding alone says 2: four directions of three


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
    taus = [matrix(shape, seed) for seed in range(3)]
    tensors = [torch.from_numpy(tau) for tau in taus]
    pairs = [
        (isotropic(taus[0]), isotropic(tensors[0], torch)),
        (
            isotropic_task_specific(sum(taus), taus, 3),
            isotropic_task_specific(sum(tensors), tensors, 3, xp=torch),
        ),
        (opcm_project(taus[0], taus[1]), opcm_project(tensors[0], tensors[1], xp=torch)),
        (rapf_fuse(taus[0], taus[1], 0.5), rapf_fuse(tensors[0], tensors[1], 0.5, torch)),
    ]
    for ours, theirs in pairs:
        assert theirs.dtype == torch.float32
        assert_allclose(theirs.numpy(), ours, **EXACT)
