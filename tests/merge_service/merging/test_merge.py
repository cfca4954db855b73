"""Merging files: properties of the output besides its numbers, identities of TIME, and inputs that must be refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from merge_service import techniques
from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE, Checkpoint
from merge_service.errors import (
    CheckpointError,
    IncompatibleCheckpoint,
    TechniqueError,
)
from merge_service.merge import advance, fold, merge
from merge_service.merging.geometry import geometry
from tests.merge_service import measured, toys
from tests.merge_service.toys import Files


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_merge_needs_neither_torch_nor_pipeline_to_start() -> None:
    code = "import sys, merge_service.merge, merge_service.service; print([m for m in sys.modules if '.' not in m])"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not [
        name for name in ("torch", "ray", "mlflow", "safetensors", "pipeline") if f"'{name}'" in modules
    ]


def test_average_is_task_arithmetic_of_one_over_n(files: Files) -> None:
    one, other = files.merge("average"), files.merge("task_arithmetic", {"scale": 0.5})
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-6)


def test_task_arithmetic_magmax_and_untrimmed_ties_of_one_expert_give_it(files: Files) -> None:
    for name, params in (
        ("task_arithmetic", {"scale": 1}),
        ("magmax", {}),
        ("ties", {"density": 1}),
        ("average", {}),
    ):
        merge(name, params, files.start, files.paths[:1], files.out)
        for tensor, value in toys.load(files.out).items():
            np.testing.assert_array_equal(value, files.experts[0][tensor], err_msg=f"{name} {tensor}")


@pytest.mark.parametrize("name", ["average", "slerp"])
def test_fold_with_weight_one_is_the_new_expert_to_the_bit(files: Files, name: str) -> None:
    fold(name, {"weight": 1}, files.start, files.paths[0], files.paths[1], files.out)
    for tensor, value in toys.load(files.out).items():
        assert value.tobytes() == files.experts[1][tensor].tobytes(), tensor


def test_fold_with_weight_one_over_k_from_the_first_expert_is_the_average(files: Files) -> None:
    third = toys.save(files.room / "e2.safetensors", toys.moved(np.random.default_rng(9), files.base))
    running = files.paths[0]
    for count, path in enumerate([files.paths[1], third], 2):
        fold(
            "average", {"weight": 1 / count}, files.start, running, path, files.room / f"r{count}.safetensors"
        )
        running = files.room / f"r{count}.safetensors"
    merge("average", {}, files.start, [*files.paths, third], files.out)
    for tensor, value in toys.load(files.out).items():
        assert value.tobytes() == toys.load(running)[tensor].tobytes(), tensor


def test_average_weights_pick_an_expert_exactly(files: Files) -> None:
    for weights, expert in (([1, 0], 0), ([0, 2.5], 1)):
        result = files.merge("average", {"weights": weights})
        for tensor, value in result.items():
            np.testing.assert_array_equal(value, files.experts[expert][tensor])


def test_exponential_schedule_survives_two_thousand_experts() -> None:
    from merge_service.techniques.shares import share

    params = techniques.get("average").resolve({"schedule": "exp"}, "merge")
    assert share(params, 2000) == 0.5 and share(params, 3) == pytest.approx(4 / 7)


def test_lines_without_growth_is_scale(files: Files) -> None:
    one = files.merge("lines", {"lines_alpha": 0.25, "lines_beta": 0})
    other = files.merge("task_arithmetic", {"scale": 0.25})
    for tensor in one:
        assert one[tensor].tobytes() == other[tensor].tobytes()


def test_lines_of_a_tower_of_one_block_gives_it_alpha_and_no_blocks_is_an_error(tmp_path: Path) -> None:
    zero, one = toys.vector([0]), toys.vector([1])
    for name, factor in (("visual.resblocks.0.w", 0.25), ("resblocks.0.w", 0.25), ("resblocks.1.w", 0.75)):
        layout = ("visual.resblocks.0.w", "resblocks.0.w", "resblocks.1.w")
        base = toys.save(tmp_path / "b.safetensors", dict.fromkeys(layout, zero))
        new = toys.save(tmp_path / "e.safetensors", dict.fromkeys(layout, one))
        merge("lines", {"lines_alpha": 0.25, "lines_beta": 0.5}, base, [new], tmp_path / "o.safetensors")
        np.testing.assert_array_equal(toys.load(tmp_path / "o.safetensors")[name], [factor])
    plain = toys.save(tmp_path / "p.safetensors", {"w": zero})
    with pytest.raises(TechniqueError, match="no tensor name holds a block number"):
        merge("lines", {}, plain, [plain], tmp_path / "o.safetensors")


def test_slerp_goes_straight_where_an_angle_means_nothing(tmp_path: Path) -> None:
    first = {"zero": [0, 0, 0], "alike": [1, 2, 3], "opposite": [1, 0, 0], "one": [2], "turned": [1, 0]}
    second = {"zero": [1, 2, 3], "alike": [2, 4, 6], "opposite": [-1, 0, 0], "one": [4], "turned": [0, 1]}
    paths = [
        toys.save(tmp_path / f"{i}.safetensors", {n: toys.vector(v) for n, v in model.items()})
        for i, model in enumerate((first, second))
    ]
    fold("slerp", {"weight": 0.25}, None, *paths, tmp_path / "o.safetensors")
    result = toys.load(tmp_path / "o.safetensors")
    for name in ("zero", "alike", "opposite", "one"):
        line = 0.75 * toys.vector(first[name]) + 0.25 * toys.vector(second[name])
        np.testing.assert_allclose(result[name], line, err_msg=name)
    assert np.linalg.norm(result["turned"]) == pytest.approx(1)
    fold("slerp", {"weight": 0.75}, None, *paths[::-1], tmp_path / "o.safetensors")
    np.testing.assert_allclose(toys.load(tmp_path / "o.safetensors")["turned"], result["turned"], atol=1e-7)


def test_density_is_the_decimal_a_person_wrote(tmp_path: Path) -> None:
    base = toys.save(tmp_path / "b.safetensors", {"w": np.zeros(10, np.float32)})
    new = toys.save(tmp_path / "e.safetensors", {"w": np.arange(1, 11, dtype=np.float32)})
    for density, kept in ((0.9, 10), (0.8, 9), (0.7, 8), (0.1, 2), (1, 10)):
        merge("ties", {"density": density}, base, [new], tmp_path / "o.safetensors")
        assert np.count_nonzero(toys.load(tmp_path / "o.safetensors")["w"]) == kept, density


@pytest.mark.parametrize("sizes", [(3_000, 700), (200_000, 1)])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("gather", [100, 1 << 16])
def test_thresholds_by_counting_are_exact(
    tmp_path: Path, sizes, wide: bool, gather: int, monkeypatch
) -> None:
    from merge_service.blocks import search

    monkeypatch.setattr(search, "GATHER", gather)
    monkeypatch.setattr(search, "BINS", 1 << 9)
    rng = np.random.default_rng(0)
    dtype = np.float64 if wide else np.float32
    arrays = {f"w{i}": (rng.standard_normal(n) ** 3).astype(dtype) for i, n in enumerate(sizes)}
    arrays["frozen"] = np.zeros(500, dtype)
    base = toys.save(tmp_path / "b.safetensors", {n: np.zeros_like(v) for n, v in arrays.items()})
    new = toys.save(tmp_path / "e.safetensors", arrays)
    for count_frozen in (True, False):
        merge("ties", {"density": 0.3, "count_frozen": count_frozen}, base, [new], tmp_path / "o.safetensors")
        moved = np.concatenate([v for n, v in arrays.items() if count_frozen or n != "frozen"])
        limit = np.sort(np.abs(moved))[int(round(0.7 * moved.size, 6)) - 1]
        for name, value in toys.load(tmp_path / "o.safetensors").items():
            np.testing.assert_array_equal(value, np.where(np.abs(arrays[name]) >= limit, arrays[name], 0))


def test_votes_that_cancel_follow_the_majority_and_stay_at_the_base_without_one(tmp_path: Path) -> None:
    base = toys.save(tmp_path / "b.safetensors", {"w": np.zeros(3, np.float32)})

    def result(one: list, two: list) -> list:
        paths = [
            toys.save(tmp_path / f"{i}.safetensors", {"w": toys.vector(v)}) for i, v in enumerate((one, two))
        ]
        merge("ties", {"density": 1}, base, paths, tmp_path / "o.safetensors")
        return toys.load(tmp_path / "o.safetensors")["w"].tolist()

    assert result([1, 2, 0], [-1, 2, 0]) == [1, 2, 0]
    assert result([1, -2, 0], [-1, -2, 0]) == [-1, -2, 0]
    assert result([1, -2, 2], [-1, 2, -2]) == [0, 0, 0]


def test_formats_may_be_mixed_and_the_base_decides_the_output(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(300).astype(np.float32)
    base = toys.save(tmp_path / "b.safetensors", {"w": values}, dtypes={"w": "BF16"})
    kinds = ("F32", "F16", "BF16", "F64")
    paths = [
        toys.save(tmp_path / f"{k}.safetensors", {"w": (values * np.float32(1.01)).astype(toys.NUMPY.get(k, np.float32))}, dtypes={"w": k})
        for k in kinds
    ]  # fmt: skip
    merge("average", {}, base, paths, tmp_path / "o.safetensors")
    with Checkpoint.open(tmp_path / "o.safetensors") as merged:
        assert merged.tensors["w"].dtype == "BF16"
    exact = np.mean([toys.load(p)["w"].astype(np.float64) for p in paths], axis=0)
    error = np.abs(toys.load(tmp_path / "o.safetensors")["w"] - exact) / np.abs(exact)
    assert error.max() <= 2**-8 * 1.001  # half a step of bfloat16: rounded once, from a wider sum
    double = toys.save(tmp_path / "d.safetensors", {"w": values.astype(np.float64)})
    merge("task_arithmetic", {"scale": 1}, double, paths[:1], tmp_path / "o.safetensors")
    np.testing.assert_array_equal(
        toys.load(tmp_path / "o.safetensors")["w"], toys.load(paths[0])["w"].astype(np.float64)
    )


def test_small_updates_survive_a_sum_in_half_precision(tmp_path: Path) -> None:
    one = toys.save(tmp_path / "b.safetensors", {"w": toys.vector([1.0])}, dtypes={"w": "BF16"})
    paths = [toys.save(tmp_path / f"{i}.safetensors", {"w": toys.vector([1.003])}) for i in range(4)]
    merge("task_arithmetic", {"scale": 1}, one, paths, tmp_path / "o.safetensors")
    assert toys.load(tmp_path / "o.safetensors")["w"][0] == 1.015625


def test_logit_scale_is_merged_up_to_ln_100_or_kept(tmp_path: Path) -> None:
    def scale(value: float, label: str) -> Path:
        return toys.save(
            tmp_path / f"{label}.safetensors", {"logit_scale": np.float32(value) * np.ones((), np.float32)}
        )

    def merged(start: float, new: float, **params) -> float:
        out = tmp_path / "o.safetensors"
        merge(
            "task_arithmetic",
            {"scale": 1} | params,
            scale(start, "b"),
            [scale(new, "x"), scale(new, "y")],
            out,
        )
        return float(toys.load(out)["logit_scale"])

    assert merged(4.0, 4.125) == 4.25
    assert merged(4.0, 4.5) == np.float32(np.log(100))
    assert merged(4.0, 4.5, logit_scale="base") == 4.0
    assert merged(4.75, 4.75) == 4.75  # a model that was never clamped is not changed by merging nothing
    with pytest.raises(TechniqueError, match="logit_scale = base needs the base"):
        merge("average", {"logit_scale": "base"}, None, [scale(1, "x")], tmp_path / "o.safetensors")


def test_ceiling_of_logit_scale_never_enters_the_state_of_a_stream(tmp_path: Path) -> None:
    """An expert above ln(100) counts as it is, in a stream as in a merge of all; float64 has no fused loop."""
    files = [
        toys.save(tmp_path / f"{i}.safetensors", {"logit_scale": np.array(value)})
        for i, value in enumerate([4.0, 6.0, 1.0])
    ]
    base, *experts = files
    merge("average", {}, base, experts, tmp_path / "all.safetensors", ids=["1", "2"])
    for order, expert in enumerate(experts, 1):
        held = tmp_path / f"state-{order - 1}.safetensors" if order > 1 else None
        advance(
            "average", {}, base, expert, tmp_path / "stream.safetensors", expert_id=str(order), state_in=held,
            state_out=tmp_path / f"state-{order}.safetensors",
        )  # fmt: skip
    assert toys.load(tmp_path / "stream.safetensors")["logit_scale"] == 3.5
    assert (tmp_path / "stream.safetensors").read_bytes() == (tmp_path / "all.safetensors").read_bytes()


def test_tied_tensors_are_merged_once_and_stay_tied(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ties = {"format": "pt", "tied": json.dumps({"head": "embedding", "absent": "embedding"})}

    def model(values: np.ndarray, head: np.ndarray | None = None) -> dict:
        return {"embedding": values, "head": values if head is None else head, "w": values[:5].copy()}

    start, new = (rng.standard_normal(200).astype(np.float32) for _ in range(2))
    base = toys.save(tmp_path / "b.safetensors", model(start), ties)
    expert = toys.save(tmp_path / "e.safetensors", model(new), ties)
    for name in ("dare_ties", "ties", "average"):
        merge(name, {}, base, [expert], tmp_path / "o.safetensors")
        result = toys.load(tmp_path / "o.safetensors")
        np.testing.assert_array_equal(result["head"], result["embedding"])
    torn = toys.save(tmp_path / "torn.safetensors", model(new, start), ties)
    with pytest.raises(
        IncompatibleCheckpoint, match="torn: head and embedding are tied in the base but differ here"
    ):
        merge("ties", {}, base, [torn], tmp_path / "o.safetensors", ids=["torn"])


def test_output_explains_itself_and_directories_bring_their_configuration(files: Files) -> None:
    for name, model in (("base", files.base), ("e0", files.experts[0])):
        toys.save(files.room / name / WEIGHTS_FILE, model)
        (files.room / name / CONFIG_FILE).write_text('{"model_cfg": {}, "preprocess_cfg": {}}')
    out = files.room / "merged"
    merge(
        "ties",
        {"density": 0.5},
        files.room / "base",
        [files.room / "e0"],
        out,
        ids=["photos"],
        sha256={"photos": "ab"},
    )
    assert (out / CONFIG_FILE).read_text() == '{"model_cfg": {}, "preprocess_cfg": {}}'
    assert toys.made(out) == {
        "technique": "ties",
        "form": "merge",
        "params": techniques.get("ties").resolve({"density": 0.5}, "merge"),
        "inputs": [{"id": "photos", "sha256": "ab"}],
    }
    with pytest.raises(CheckpointError, match=r"name a \.safetensors file"):
        merge("average", {}, None, files.paths, files.room / "elsewhere")


def test_output_opens_in_safetensors(files: Files) -> None:
    from safetensors import safe_open

    files.merge("ties")
    with safe_open(files.out, "numpy") as theirs:
        assert set(theirs.keys()) == set(files.base) and theirs.metadata()["format"] == "pt"


def test_a_merge_may_replace_one_of_its_inputs(files: Files) -> None:
    expected = files.merge("average")
    merge("average", {}, files.start, files.paths, files.paths[0])
    for name, value in toys.load(files.paths[0]).items():
        np.testing.assert_array_equal(value, expected[name])


def test_a_weighted_stream_equals_the_batch(files: Files) -> None:
    params, state = {"weights": [1, 3]}, None
    for number, path in enumerate(files.paths, 1):
        target = files.room / f"s{number}.safetensors"
        advance("average", params, files.start, path, files.room / "stream.safetensors",
                expert_id=f"expert-{number}", state_in=state, state_out=target)  # fmt: skip
        state = target
    files.merge("average", params, ids=["expert-1", "expert-2"])
    assert files.out.read_bytes() == (files.room / "stream.safetensors").read_bytes()
    with pytest.raises(TechniqueError, match="at least 3 experts"):
        advance(
            "average",
            params,
            files.start,
            files.paths[0],
            None,
            expert_id="c",
            state_in=state,
            state_out=files.out,
        )


def test_sharded_experts_merge_like_whole_ones(files: Files) -> None:
    expected = files.merge("ties")
    names, room = list(files.experts[1]), files.room / "sharded"
    for part in (0, 1):
        toys.save(room / f"{part}.safetensors", {n: files.experts[1][n] for n in names[part::2]})
    where = {name: f"{number % 2}.safetensors" for number, name in enumerate(names)}
    (room / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    for path in (room, room / "model.safetensors.index.json"):
        merge("ties", {}, files.start, [files.paths[0], path], files.out)
        for name, value in toys.load(files.out).items():
            assert value.tobytes() == expected[name].tobytes()


@pytest.mark.parametrize("name", measured.GIVEN)
def test_tensor_without_elements_is_kept_and_changes_nothing(files: Files, tmp_path: Path, name: str) -> None:
    def with_empty(path: Path) -> Path:
        tensors = toys.load(path) | {"visual.none.weight": np.empty((0, 4), np.float32)}
        return measured.of_technique(name, toys.save(tmp_path / f"empty-{path.name}", tensors))

    paths = [measured.of_technique(name, path) for path in files.paths[: techniques.get(name).arity or 2]]
    ids = [path.name for path in paths]
    merge(name, {}, files.start, paths, files.out, ids=ids)
    expected = toys.load(files.out)
    merge(name, {}, with_empty(files.start), [with_empty(path) for path in paths], files.out, ids=ids)
    found = toys.load(files.out)
    assert found.pop("visual.none.weight").shape == (0, 4)
    assert {n: v.tobytes() for n, v in found.items()} == {n: v.tobytes() for n, v in expected.items()}


def test_geometry_is_measured_in_float64(files: Files) -> None:
    report = merge("task_arithmetic", {"scale": 0.5}, files.start, files.paths, files.out)
    tau = [np.concatenate([np.ravel(m[n] - files.base[n]) for n in m if m[n].dtype == np.float32]).astype(float)
           for m in (toys.load(files.out), files.experts[1])]  # fmt: skip
    found = geometry(files.start, files.out, files.paths[1], threads=2)
    assert found["merged_norm"] == report.merged_norm == pytest.approx(float(np.linalg.norm(tau[0])))
    assert found["expert_norm"] == pytest.approx(float(np.linalg.norm(tau[1])))
    assert found["cosine"] == pytest.approx(
        float(tau[0] @ tau[1] / np.linalg.norm(tau[0]) / np.linalg.norm(tau[1]))
    )
    assert geometry(files.start, files.start, files.paths[1])["cosine"] == 0
