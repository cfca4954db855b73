"""Iso-C, Iso-CTS and SVC: their laws, and the same by plain SVD in float64."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from merge_service.errors import TechniqueError
from merge_service.merge import merge
from merge_service.techniques.families import spectra
from merge_service.techniques.families.spectra import task_dimensions
from tests.merge_service import toys
from tests.merge_service.matrices import EXACT, SHAPES, matrix, rotation, shapes, spectrum, svd

isotropic = partial(spectra.isotropic, xp=np)
isotropic_task_specific = partial(spectra.isotropic_task_specific, xp=np)
calibrated = partial(spectra.calibrated, xp=np)


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


def plain_calibration(taus: list, scale: float, alpha: float) -> np.ndarray:
    """SVC direction by direction, with the whole factor `scale`."""
    delta = scale * sum(tau.astype(float) for tau in taus)
    left, values, _ = svd(delta)
    out = np.zeros_like(delta)
    for u in left[:, values > 1e-9 * values[0]].T:
        along = [u @ tau for tau in taus]
        times = sum(max(alpha, (u @ delta) @ one / (one @ one)) for one in along)
        out += len(taus) / times * np.outer(u, u @ delta)
    return out


@shapes
@pytest.mark.parametrize(("scale", "alpha"), [(0.3, 0.1), (1, 0.5), (-0.5, 0.1)])
def test_svc_equals_plain_svd(shape: tuple, scale: float, alpha: float) -> None:
    taus = [matrix(shape, seed) for seed in range(3)]
    result = calibrated(sum(taus), iter(taus), scale=scale, alpha=alpha)
    assert result.dtype == np.float32 and result.flags.c_contiguous
    assert_allclose(scale * result, plain_calibration(taus, scale, alpha), **EXACT)


def test_svc_gives_the_golden_model(tmp_path: Path) -> None:
    golden = json.loads((Path(__file__).parents[3] / "golden" / "svc.json").read_text())
    base, *experts = (
        toys.save(tmp_path / f"{number}.safetensors", {name: toys.vector(x) for name, x in model.items()})
        for number, model in enumerate([golden["base"], *golden["experts"]])
    )
    merge("svc", golden["params"], base, experts, tmp_path / "out.safetensors")
    for name, value in toys.load(tmp_path / "out.safetensors").items():
        assert_allclose(value, golden["merged"][name], rtol=0, atol=golden["tolerance"], err_msg=name)


@shapes
@pytest.mark.parametrize("copies", [1, 4])
def test_svc_of_copies_of_one_expert_gives_it_back_at_any_scale_that_counts(
    shape: tuple, copies: int
) -> None:
    tau = matrix(shape)
    for scale in (0.1, 0.3, 2):
        result = calibrated(tau * np.float32(copies), [tau] * copies, scale=scale, alpha=0.1)
        assert_allclose(scale * result, tau, **EXACT)
    little = calibrated(tau, [tau], scale=0.01, alpha=0.1)  # counts alpha times, not scale times
    assert_allclose(0.01 * little, 0.1 * tau, **EXACT)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)], ids=str)
def test_svc_counts_an_expert_that_is_not_in_a_direction_alpha_times(shape: tuple) -> None:
    one, other = matrix(shape, 1), matrix(shape, 2)
    one[12:], one[:, 12:], other[:12], other[:, :12] = (
        0,
        0,
        0,
        0,
    )  # no direction of one is a direction of the other
    result = calibrated(one + other, [one, other], scale=0.5, alpha=0.1)
    assert_allclose(result, (one + other) * 2 / (0.5 + 0.1), rtol=1e-5, atol=1e-6)


def test_svc_follows_scale_and_order_and_leaves_zeros() -> None:
    taus = [matrix((40, 16), seed) for seed in range(3)]
    options = {"scale": 0.3, "alpha": 0.1}
    result = calibrated(sum(taus), taus, **options)
    eightfold = calibrated(8 * sum(taus), [8 * tau for tau in taus], **options)
    assert np.array_equal(eightfold, 8 * result)
    assert_allclose(calibrated(sum(taus), taus[::-1], **options), result, **EXACT)
    zero = np.zeros((6, 4), np.float32)
    assert not calibrated(zero, [zero, zero], **options).any()
    assert not calibrated(taus[0] - taus[0], [taus[0], -taus[0]], **options).any()


def test_svc_without_blocks_is_refused_unless_all_matrices_are_meant(tmp_path: Path) -> None:
    base, one = (
        toys.save(tmp_path / f"{seed}.safetensors", {"w": matrix((6, 4), seed)}) for seed in range(2)
    )
    with pytest.raises(TechniqueError, match=r"no tensor name holds a block number.*set scope to matrices"):
        merge("svc", {}, base, [one], tmp_path / "out.safetensors")
    merge("svc", {"scope": "matrices"}, base, [one], tmp_path / "out.safetensors")
    assert_allclose(toys.load(tmp_path / "out.safetensors")["w"], matrix((6, 4), 1), **EXACT)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_torch_gives_what_numpy_gives(shape: tuple) -> None:
    taus = [matrix(shape, seed) for seed in range(3)]
    tensors = [torch.from_numpy(tau) for tau in taus]
    options = {"scale": 0.3, "alpha": 0.1}
    pairs = [
        (isotropic(taus[0]), isotropic(tensors[0], xp=torch)),
        (
            isotropic_task_specific(sum(taus), taus, 3),
            isotropic_task_specific(sum(tensors), tensors, 3, xp=torch),
        ),
        (calibrated(sum(taus), taus, **options), calibrated(sum(tensors), tensors, **options, xp=torch)),
    ]
    for ours, theirs in pairs:
        assert theirs.dtype == torch.float32
        assert_allclose(theirs.numpy(), ours, **EXACT)
