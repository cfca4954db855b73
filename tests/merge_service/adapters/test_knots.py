"""KnOTS: adapters merged in a basis that they share, against golden vectors and identities."""

from pathlib import Path

import numpy as np
import pytest

from merge_service.checkpoints import Checkpoint, open_weights
from merge_service.errors import UserError
from merge_service.merging import Factors, write_adapter
from merge_service.merging.adapters.knots import shared_basis
from pipeline.merging.adapters import merge_to_adapter
from pipeline.merging.files import Execution, FileMerge
from tests.merge_service.adapters import peft_cases
from tests.merge_service.statistics.golden import FOLDER
from tests.merge_service.statistics.golden import case as golden_case

ONE = Execution(threads=1)


def factors(name: str, tau: np.ndarray) -> Factors:
    left, values, right = np.linalg.svd(tau.astype(np.float64), full_matrices=False)
    return Factors(name, tau.shape, (left * values).astype(np.float32), right.astype(np.float32))


def test_golden_vectors_of_the_matrices_of_blocks(tmp_path: Path) -> None:
    golden, case = FOLDER, golden_case("knots-ties")
    with (
        Checkpoint.open(golden / case["base"]) as base,
        Checkpoint.open(golden / case["expected"]) as expected,
    ):
        names = [n for n, info in base.tensors.items() if len(info.shape) == 2 and "resblocks" in n]
        adapters = []
        for number, file in enumerate(case["experts"]):
            with Checkpoint.open(golden / file) as expert:
                taus = {n: (expert.read(n) - base.read(n)).reshape(base.tensors[n].shape) for n in names}
            write_adapter(
                tmp_path / f"a{number}", golden / case["base"], [factors(n, t) for n, t in taus.items()]
            )
            adapters.append(tmp_path / f"a{number}")
        params = {key: case["params"][key] for key in ("density", "consensus", "granularity")}
        what = FileMerge("ties", params, golden / case["base"], adapters, tmp_path / "out")
        merge_to_adapter(what, None, ONE, knots=True)
        with open_weights(tmp_path / "out", golden / case["base"]) as got:
            for name in names:
                want = expected.read(name)
                assert np.all(np.abs(got.read(name) - want) <= case["atol"] + case["rtol"] * np.abs(want)), (
                    name
                )
    assert len(names) > 3


def products(
    seed: int, ranks: list[int], rows: int = 12, columns: int = 9
) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(rows, rank)), rng.normal(size=(rank, columns))) for rank in ranks]


@pytest.mark.parametrize(("ranks", "rank"), [([2, 3], 5), ([2, 2, 2], 6), ([7, 7], 9), ([1], 1)])
def test_basis_is_orthonormal_and_holds_every_update(ranks: list[int], rank: int) -> None:
    pairs = products(1, ranks)
    basis, coordinates = shared_basis(pairs)
    assert basis.shape == (12, min(rank, 12)) if sum(ranks) < 9 else basis.shape[1] <= sum(ranks)
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-12)
    for (left, right), one in zip(pairs, coordinates):
        np.testing.assert_allclose(basis @ one, left @ right, atol=1e-10)
    values = np.linalg.svd(np.concatenate([left @ right for left, right in pairs], axis=1), compute_uv=False)
    found = np.linalg.norm(np.concatenate(coordinates, axis=1), axis=1)
    np.testing.assert_allclose(found, values[: len(found)], rtol=1e-9)


def test_expert_without_an_update_has_zeros_and_equal_updates_share_directions() -> None:
    (one, other) = products(2, [2, 2])
    basis, (first, none, second) = shared_basis([one, None, one])
    assert basis.shape[1] == 2 and not none.any() and np.allclose(first, second, atol=1e-12)
    assert shared_basis([(other[0] * 0, other[1])])[0].shape == (12, 0)


def adapters(tmp_path: Path) -> tuple[Path, list[Path]]:
    return peft_cases.base(tmp_path), [peft_cases.adapter(tmp_path, case) for case in ("plain", "patterns")]


def read(base: Path, adapter: Path) -> dict[str, np.ndarray]:
    with open_weights(adapter, base) as held:
        return {name: held.read(name).copy() for name in held.tensors}


@pytest.mark.parametrize("cases", [("plain", "patterns"), ("conv1d_of_gpt2", "conv1d_of_gpt2")])
def test_sums_are_those_of_the_updates_also_where_matrices_are_stored_turned(
    tmp_path: Path, cases: tuple[str, str]
) -> None:
    base = peft_cases.base(tmp_path)
    experts = [peft_cases.adapter(tmp_path, case, f"{at}-{case}") for at, case in enumerate(cases)]
    for name, knots in (("plain out", False), ("shared out", True)):
        what = FileMerge("task_arithmetic", {"scale": 0.5}, base, experts, tmp_path / name)
        merge_to_adapter(what, None, ONE, knots=knots)
    one, other = read(base, tmp_path / "plain out"), read(base, tmp_path / "shared out")
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, atol=2e-5, err_msg=name)


def test_one_adapter_gives_itself_back_and_masks_depend_on_ids_alone(tmp_path: Path) -> None:
    base, experts = adapters(tmp_path)
    merge_to_adapter(
        FileMerge("ties", {"density": 1}, base, experts[:1], tmp_path / "same"), None, ONE, knots=True
    )
    want = read(base, experts[0])
    assert all(
        np.allclose(value, want[name], atol=1e-5) for name, value in read(base, tmp_path / "same").items()
    )
    made = []
    for name, ids in (("a", ["x", "y"]), ("b", ["x", "y"]), ("c", ["x", "z"])):
        what = FileMerge("dare_ties", {"density": 0.5}, base, experts, tmp_path / name, ids=ids)
        merge_to_adapter(what, None, ONE, knots=True)
        made.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert made[0] == made[1] != made[2]


def test_what_has_no_shared_basis_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    base, experts = adapters(tmp_path)
    for technique, experts_, rank, says in (
        ("ties", experts, 2, "leave --rank out"),
        ("regmean", experts, None, "leave --knots out"),
        ("ties", [experts[0], base], None, "is no adapter"),
        ("ties", [experts[0], peft_cases.adapter(tmp_path, "dora")], None, "DoRA"),
    ):
        with pytest.raises(UserError, match=says):
            merge_to_adapter(
                FileMerge(technique, {}, base, experts_, tmp_path / "out"), rank, ONE, knots=True
            )
    assert not (tmp_path / "out").exists()
