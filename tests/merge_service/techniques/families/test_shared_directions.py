"""KnOTS-TIES of whole checkpoints: against plain singular vectors, adapters in a shared basis, and identities."""

from pathlib import Path

import numpy as np
import pytest

from merge_service.blocks.singular import shared_frame
from merge_service.merge import merge
from merge_service.merging import Factors, write_adapter
from pipeline.merging.adapters import merge_to_adapter
from pipeline.merging.files import Execution, FileMerge
from tests.merge_service import plain_extra, toys

Model = dict[str, np.ndarray]
SHAPES = {
    "visual.transformer.resblocks.0.attn.in_proj_weight": (24, 8),
    "visual.transformer.resblocks.0.mlp.c_fc.weight": (31, 5),
    "transformer.resblocks.0.mlp.c_proj.weight": (5, 31),
    "transformer.resblocks.0.mlp.c_fc.bias": (9,),
    "token_embedding.weight": (13, 8),
    "logit_scale": (),
}
MATRICES = [name for name, shape in SHAPES.items() if len(shape) == 2]


def models(rank: int | None = None, scale: float = 0.1) -> list[Model]:
    """A base and three experts of normal numbers, whose task vectors have this rank."""
    rng = np.random.default_rng(4)
    base = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    experts = []
    for _ in range(3):
        moved = {n: scale * rng.standard_normal(s) for n, s in SHAPES.items()}
        for name in MATRICES if rank else ():
            rows, columns = SHAPES[name]
            moved[name] = scale * rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns))
        experts.append({n: (v + moved[n]).astype(np.float32) for n, v in base.items()})
    return [base, *experts]


def saved(room: Path, given: list[Model]) -> list[Path]:
    return [toys.save(room / f"{at}.safetensors", one) for at, one in enumerate(given)]


CASES = [
    {},
    {"consensus": "sum", "granularity": "model", "scale": 0.5},
    {"consensus": "max", "granularity": "tensor", "attention": "whole"},
    {"density": 1, "scope": "matrices"},
    {"density": [0.3, 0.5, 1], "scope": "matrices"},
]


@pytest.mark.parametrize("params", CASES, ids=str)
@pytest.mark.parametrize("rank", [None, 1])
def test_merge_is_ties_over_the_coordinates_of_a_plain_svd(
    tmp_path: Path, rank: int | None, params: dict
) -> None:
    base, *experts = models(rank)
    start, *paths = saved(tmp_path, [base, *experts])
    report = merge("knots_ties", params, start, paths, tmp_path / "out.safetensors", ids=["a", "b", "c"])
    of_all = isinstance(params.get("density"), list)
    given = report.params if not of_all else report.params | {"density": params["density"]}
    want = plain_extra.merge("knots_ties", given, base, experts, ["a", "b", "c"])
    for name, value in toys.load(tmp_path / "out.safetensors").items():
        np.testing.assert_allclose(value, want[name], rtol=0, atol=3e-6, err_msg=name)


def test_merge_of_whole_models_is_that_of_their_adapters_in_a_shared_basis(tmp_path: Path) -> None:
    base, *experts = models(rank=2, scale=0.01)
    start, *_ = saved(tmp_path, [base])
    whole, adapters = [], []
    for at, expert in enumerate(experts):
        factors = []
        for name in MATRICES:
            left, values, right = np.linalg.svd(np.float64(expert[name]) - base[name], full_matrices=False)
            left, right = (left[:, :2] * values[:2]).astype(np.float32), right[:2].astype(np.float32)
            factors.append(Factors(name, SHAPES[name], left, right))
        write_adapter(tmp_path / f"a{at}", start, factors)
        adapters.append(tmp_path / f"a{at}")
        alone = {n: expert[n] if n in MATRICES else v for n, v in base.items()}
        whole.append(toys.save(tmp_path / f"w{at}.safetensors", alone))
    params = {"density": 0.4, "granularity": "model"}
    merge_to_adapter(
        FileMerge("ties", params, start, adapters, tmp_path / "adapter"),
        None,
        Execution(threads=1),
        knots=True,
    )
    merge("average", {}, None, [tmp_path / "adapter"], tmp_path / "one.safetensors")
    fixed = params | {"attention": "whole", "scope": "matrices"}
    merge("knots_ties", fixed, start, whole, tmp_path / "other.safetensors")
    one, other = toys.load(tmp_path / "one.safetensors"), toys.load(tmp_path / "other.safetensors")
    for name in MATRICES:
        np.testing.assert_allclose(other[name], one[name], rtol=0, atol=2e-5, err_msg=name)


def test_one_expert_is_given_back_and_opposite_ones_give_the_base(tmp_path: Path) -> None:
    base, expert, *_ = models()
    mirror = {n: 2 * base[n] - expert[n] for n in base}
    start, one, other = saved(tmp_path, [base, expert, mirror])
    merge("knots_ties", {"density": 1}, start, [one], tmp_path / "out.safetensors")
    for name in MATRICES:
        np.testing.assert_allclose(
            toys.load(tmp_path / "out.safetensors")[name], expert[name], rtol=0, atol=1e-6
        )
    merge("knots_ties", {"cutoff": 1e9}, start, [one, other], tmp_path / "out.safetensors")
    for name in MATRICES[:3]:
        np.testing.assert_array_equal(toys.load(tmp_path / "out.safetensors")[name], base[name])


@pytest.mark.parametrize("shape", [(12, 7), (40, 7), (7, 12)])
@pytest.mark.parametrize("rank", [7, 2, 0])
def test_shared_directions_hold_every_matrix(shape: tuple[int, int], rank: int) -> None:
    rng = np.random.default_rng(1)
    given = [rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1])) for _ in range(2)]
    basis, parts = shared_frame(given, 1e-5, np)
    assert basis.shape == (shape[0], np.linalg.matrix_rank(np.concatenate(given, 1)) if rank else 0)
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-9)
    for one, part in zip(given, parts, strict=True):
        np.testing.assert_allclose(basis @ part, one, atol=1e-9)
