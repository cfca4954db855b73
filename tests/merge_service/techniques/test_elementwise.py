"""Elementwise techniques beyond TIME's: where their references break down, identities between them, numbers of whole tensors."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from merge_service import techniques
from merge_service.blocks import search
from merge_service.blocks import spans as engine
from merge_service.blocks.questions import Findings, together
from merge_service.checkpoints import Checkpoint
from merge_service.engine import fused as loops
from merge_service.engine.compute import Compute
from merge_service.engine.prepare import prepare
from merge_service.engine.survey import Surveyor
from merge_service.engine.task import Input, MergeTask
from merge_service.errors import TechniqueError
from merge_service.merge import fold, merge
from tests.merge_service import plain_extra, toys
from tests.merge_service.toys import Files

FURTHER = [n for n in plain_extra.TECHNIQUES if n != "dare_ties"]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def moved(room: Path, name: str, params: dict, *taus, base=None) -> np.ndarray:
    """How far the tensor `w` of a merge is from its base, which is zero."""
    taus = [toys.vector(tau) for tau in taus]
    zero = toys.save(room / "b.safetensors", {"w": np.zeros_like(taus[0])})
    paths = [toys.save(room / f"{i}.safetensors", {"w": tau}) for i, tau in enumerate(taus)]
    merge(name, params, zero, paths, room / "o.safetensors")
    return toys.load(room / "o.safetensors")["w"]


def test_breadcrumbs_keep_something_of_tensors_and_rows_too_short_for_the_fractions(tmp_path: Path) -> None:
    tau = np.arange(1, 11)
    params = {"density": 0.6, "outliers": 0.01, "scale": 1}  # MergeKit: int(.01 * 10) = 0 loses everything
    for granularity in ("tensor", "row"):
        kept = moved(tmp_path, "breadcrumbs", params | {"granularity": granularity}, tau)
        np.testing.assert_array_equal(kept, np.where(tau > 4, tau, 0))
    short = moved(tmp_path, "breadcrumbs", {"density": 0.15, "scale": 1}, [[1, -3, 2], [0, 0, 0]])
    np.testing.assert_array_equal(short, [[0, -3, 0], [0, 0, 0]])  # the released code keeps int(.15 * 3) = 0


def test_breadcrumbs_of_everything_is_task_arithmetic(files: Files) -> None:
    everything = {"density": 1, "outliers": 0, "scale": 0.5}
    expected = files.merge("task_arithmetic", {"scale": 0.5})
    for granularity in ("row", "tensor", "model"):
        result = files.merge("breadcrumbs", everything | {"granularity": granularity})
        for name, value in expected.items():
            assert result[name].tobytes() == value.tobytes(), name


def test_dare_and_della_with_equal_chances_are_the_same(files: Files) -> None:
    params = {"density": 0.5, "scale": 1}
    for rescale in ("expectation", "l1"):
        one = files.merge("dare", params | {"rescale": rescale})
        other = files.merge("della_linear", params | {"rescale": rescale, "epsilon": 0})
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-6, atol=1e-6)


def test_rescaling_by_l1_gives_every_tensor_its_norm_back_where_anything_is_left(tmp_path: Path) -> None:
    tau = np.random.default_rng(0).standard_normal((300, 50)).astype(np.float32)
    for name in ("dare", "della_linear"):
        out = moved(tmp_path, name, {"density": 0.3, "rescale": "l1", "scale": 1}, tau)
        assert 0.25 < np.count_nonzero(out) / out.size < 0.35
        assert np.abs(out).sum(dtype=float) == pytest.approx(np.abs(tau).sum(dtype=float), rel=1e-6)
        lost = [
            moved(tmp_path, name, {"density": 0.2, "rescale": "l1", "scale": 1, "seed": seed}, [1.5])
            for seed in range(20)
        ]
        assert {float(one[0]) for one in lost} == {0.0, 1.5}


def test_density_one_drops_nothing_whatever_the_seed_and_epsilon(files: Files) -> None:
    expected = files.merge("task_arithmetic", {"scale": 1})
    for name in ("dare", "della_linear"):
        for rescale in ("expectation", "l1"):
            result = files.merge(name, {"density": 1, "scale": 1, "seed": 9, "rescale": rescale})
            for tensor, value in expected.items():
                assert result[tensor].tobytes() == value.tobytes(), tensor


def test_della_keeps_large_magnitudes_more_often_and_equal_ones_alike(tmp_path: Path) -> None:
    params = {"density": 0.5, "epsilon": 0.4, "scale": 1}
    rows = np.tile(np.float32([1, 2, 3, 4, 5]), (4000, 1))
    shares = np.count_nonzero(moved(tmp_path, "della_linear", params, rows), axis=0) / 4000
    np.testing.assert_allclose(shares, [0.1, 0.3, 0.5, 0.7, 0.9], atol=4 * np.sqrt(0.25 / 4000))
    equal = np.ones((4000, 5), np.float32)
    kept = moved(tmp_path, "della_linear", params, equal)
    np.testing.assert_allclose(np.count_nonzero(kept, axis=0) / 4000, 0.5, atol=4 * np.sqrt(0.25 / 4000))
    assert set(np.unique(kept)) == {0, 2}
    single = moved(tmp_path, "della_linear", params, np.ones((4000, 1)))  # 0 / 0 in the references
    assert set(np.unique(single)) == {0, 2} and abs(np.mean(single) - 1) < 0.1


@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_della_refuses_chances_outside_of_zero_to_one(name: str, files: Files) -> None:
    for params in ({"density": 0.1}, {"density": 0.15}, {"density": 0.9}):
        with pytest.raises(TechniqueError, match="lower epsilon"):
            files.merge(name, params)
    files.merge(name, {"density": 0.85})


def test_dare_ties_with_a_second_trim_is_ties_of_what_was_dropped(files: Files) -> None:
    """FusionBench and MergeLM: DARE first, TIES with its own trim on the result."""
    params = {"density": 0.5, "seed": 3}
    dropped = []
    for number, path in enumerate(files.paths):
        dropped.append(files.room / f"dropped{number}.safetensors")
        merge("dare", params | {"scale": 1}, files.start, [path], dropped[-1], ids=[f"t{number}"])
    merge("ties", {"density": 0.3, "granularity": "tensor"}, files.start, dropped, files.out)
    expected = toys.load(files.out)
    params |= {"trim": 0.3, "granularity": "tensor"}
    result = files.merge("dare_ties", params, ids=["t0", "t1"])
    for name in set(expected) - {"logit_scale"}:
        np.testing.assert_array_equal(result[name], expected[name], err_msg=name)


def test_sce_is_the_expert_where_experts_agree_however_little_they_moved(tmp_path: Path) -> None:
    for size in (1, 1e-6):  # MergeKit weighs all alike below a mean square of 1e-6
        tau = np.float32(size) * np.float32([1, -2, 3, 0])
        np.testing.assert_array_equal(moved(tmp_path, "sce", {}, tau), tau)
        np.testing.assert_array_equal(moved(tmp_path, "sce", {}, tau, tau, tau), tau)
        large = moved(tmp_path, "sce", {"density": 1}, tau, 2 * tau)
        np.testing.assert_allclose(large, tau * (1 + 4 * 2) / 5, rtol=1e-6)


def test_sce_selects_a_share_of_the_positions_that_differ(tmp_path: Path) -> None:
    one, other = np.zeros(100, np.float32), np.zeros(100, np.float32)
    one[:20], other[20:30] = np.arange(1, 21), 0.5
    out = moved(tmp_path, "sce", {"density": 0.1}, one, other)  # 3 of 30 that differ, not 10 of 100
    np.testing.assert_array_equal(np.flatnonzero(out), [17, 18, 19])
    assert np.count_nonzero(moved(tmp_path, "sce", {"density": 0.001}, one, other)) == 1


def test_consensus_goes_from_the_sum_to_the_base_as_more_must_agree(files: Files) -> None:
    expected = files.merge("task_arithmetic", {"scale": 1})
    nobody = files.merge("consensus", {"min_tasks": 0, "scale": 1})
    many = files.merge("consensus", {"min_tasks": 3, "scale": 1})
    for name, value in expected.items():
        np.testing.assert_array_equal(nobody[name], value)
        assert many[name].tobytes() == files.base[name].tobytes()
    merge("consensus", {"min_tasks": 1, "scale": 1}, files.start, files.paths[:1], files.out)
    alone = toys.load(files.out)
    for name in alone:
        np.testing.assert_array_equal(alone[name], files.experts[0][name])


def test_pcb_survives_equal_magnitudes_equal_scores_and_many_experts(tmp_path: Path) -> None:
    for how in ("sum", "pairs"):
        params = {"density": 0.5, "inter_balance": how}
        for granularity in ("tensor", "model"):
            equal = moved(tmp_path, "pcb", params | {"granularity": granularity}, [2, 2, 2, 2])
            assert np.isfinite(equal).all() and set(equal) <= {0, 2}
        np.testing.assert_array_equal(moved(tmp_path, "pcb", params, [0, 0, 0], [0, 0, 0]), [0, 0, 0])
        taus = [
            [1, -2, 0.25 + i / 128, 4] for i in range(100)
        ]  # exp(n) overflows float32 at 89, float64 at 710
        many = moved(tmp_path, "pcb", params, *taus)
        np.testing.assert_array_equal(many, [0, -2, 0, 2])  # the largest magnitude is clamped to the next
    twenty = moved(tmp_path, "pcb", {"density": 1, "winsorize": 0}, np.arange(1, 21))
    assert twenty[0] == 0 and np.all(twenty[1:18] == np.arange(2, 19))  # the lowest score counts for nothing


def test_random_mix_takes_every_expert_alike_and_a_new_one_changes_only_what_it_wins(tmp_path: Path) -> None:
    taus = [np.full(30_000, value, np.float32) for value in (1, 2, 4)]
    before, after = (moved(tmp_path, "random_mix", {}, *taus[:count]) for count in (2, 3))
    for value in (1, 2, 4):
        assert abs(np.mean(after == value) - 1 / 3) < 4 * np.sqrt(2 / 9 / 30_000)
    np.testing.assert_array_equal(after[after != 4], before[after != 4])


def test_ram_averages_over_those_that_moved_further_than_the_threshold(tmp_path: Path) -> None:
    taus = [1, 0.25, 0.1, -0.5], [0, 0.25, 0.2, 1]
    np.testing.assert_array_equal(
        moved(tmp_path, "ram", {"threshold": 0.2}, *taus), toys.vector([1, 0.25, 0, 0.25])
    )
    np.testing.assert_array_equal(
        moved(tmp_path, "ram", {"threshold": 0.19}, *taus), toys.vector([1, 0.25, 0.2, 0.25])
    )


def test_nearswap_moves_no_weight_further_than_the_threshold_and_arrives_within_it(files: Files) -> None:
    result = files.merge("nearswap", {"threshold": 0.5})
    for name in result.keys() - {"position_ids", "visual.mask", "logit_scale"}:
        running, new = files.experts[0][name], files.experts[1][name]
        near = np.abs(new - running) <= 0.5
        np.testing.assert_array_equal(result[name][near], new[near])
        np.testing.assert_array_equal(np.abs(result[name] - running)[~near], 0.5)
    with pytest.raises(TechniqueError, match="exactly 2"):
        merge("nearswap", {}, files.start, files.paths[:1], files.out)


def test_wise_ft_lies_between_the_base_and_the_average(files: Files) -> None:
    average, base = files.merge("average"), files.base
    for weight in (0.25, 1):
        result = files.merge("wise_ft", {"weight": weight})
        for name in result.keys() - {"position_ids", "visual.mask", "logit_scale"}:
            between = base[name] + weight * (average[name] - base[name])
            np.testing.assert_allclose(result[name], between, rtol=1e-6, atol=1e-6)
    with pytest.raises(TechniqueError, match="wise_ft has no fold form"):
        fold("wise_ft", {}, files.start, files.paths[0], files.paths[1], files.out)


def big(room: Path) -> tuple[dict, list[dict], list[Path]]:
    """Models large enough for thresholds to be counted, not sorted, and for spans and rows to cut across each other."""
    rng = np.random.default_rng(7)
    shapes = {"visual.a": (139, 503), "b": (20_000,), "logit_scale": ()}
    base = {n: np.asarray(rng.standard_normal(s), np.float32) for n, s in shapes.items()}
    experts = [
        {n: np.float32(v + 0.1 * rng.standard_normal(v.shape) ** 3) for n, v in base.items()}
        for _ in range(3)
    ]
    paths = [toys.save(room / f"{i}.safetensors", model) for i, model in enumerate([base, *experts])]
    return base, experts, paths


VARIANTS = [
    ("breadcrumbs", {"granularity": "tower"}),
    ("dare", {"rescale": "l1"}),
    ("della", {"rescale": "l1"}),
    ("dare_ties", {"trim": 0.2, "rescale": "l1"}),
    ("sce", {}),
    ("sce", {"density": 0.5, "erase_unselected": False}),
    ("pcb", {"winsorize": 0.01}),
    ("pcb", {"inter_balance": "pairs", "granularity": "model"}),
]


@pytest.fixture
def small_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches by many narrow steps, as they happen in large models."""
    for bound, value in {"GATHER": 1 << 10, "BINS": 1 << 9, "COUNTS": 1 << 12, "SAMPLE": 1 << 14}.items():
        monkeypatch.setattr(search, bound, value)


@pytest.mark.parametrize(("name", "params"), VARIANTS, ids=str)
def test_numbers_of_whole_tensors_are_exact_in_any_block_on_any_thread(
    tmp_path: Path, small_counts: None, name: str, params: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts, paths = big(tmp_path)
    ids, seen = ["t1", "t2", "t3"], set()
    for block, threads, counting in ((1, 1, engine.GRAIN), (1 << 20, 2, 1 << 17)):
        monkeypatch.setattr("merge_service.engine.survey.BLOCK", counting)
        out = tmp_path / "out.safetensors"
        report = merge(name, params, paths[0], paths[1:], out, ids=ids, block=block, threads=threads)
        seen.add(out.read_bytes())
    assert len(seen) == 1
    expected = plain_extra.merge(name, report.params, base, experts, ids)
    result = toys.load(tmp_path / "out.safetensors")
    for tensor in ("visual.a", "b"):
        wrong = ~np.isclose(result[tensor], expected[tensor], rtol=1e-5, atol=1e-5)
        assert wrong.mean() < 1e-4, (
            tensor
        )  # a sum that rounds to another sign moves an element far, but very few do


@pytest.mark.parametrize(("name", "params"), [("ties", {}), *VARIANTS], ids=str)
def test_parts_of_a_model_that_are_asked_apart_find_the_same_numbers(
    tmp_path: Path, small_counts: None, name: str, params: dict
) -> None:
    _, _, paths = big(tmp_path)
    technique = techniques.get(name)
    opened = [Checkpoint.open(path) for path in paths]

    inputs = [Input(f"t{i}", i, weights) for i, weights in enumerate(opened[1:], 1)]
    task = MergeTask.of(technique, technique.resolve(params, "merge"), opened[0], inputs)
    machines = [Surveyor(task, task.merged[:1]), Surveyor(task, task.merged[1:])]

    def ask(question):
        sent = pickle.dumps(question)
        return together([pickle.loads(pickle.dumps(one.answer(pickle.loads(sent)))) for one in machines])

    whole = prepare(task, Surveyor(task, task.combined).answer)
    assert whole == prepare(task, ask) and whole != Findings()


@pytest.mark.parametrize("name", [n for n in techniques.names() if n != "slerp"])
def test_fused_loops_give_the_bits_of_the_definitions(
    files: Files, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = files.merge(name)
    monkeypatch.setattr(loops, "fits", lambda weights, tensor: False)
    for tensor, value in files.merge(name).items():
        assert value.tobytes() == fused[tensor].tobytes(), tensor


@pytest.mark.parametrize("name", ["dare", "wise_ft", "breadcrumbs"])
def test_what_can_be_fused_is(files: Files, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compute, "_by_definition", None)
    files.merge(name, {"granularity": "tensor"} if name == "breadcrumbs" else {})


@pytest.mark.parametrize("name", FURTHER)
def test_half_precision_and_double_inputs_are_merged_in_a_wide_enough_type(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(2)
    count = techniques.get(name).arity or 3
    base = {"w": toys.dyadic(rng, (6, 7), 8)}
    experts = [{"w": base["w"] + toys.dyadic(rng, (6, 7), 8)} for _ in range(count)]
    ids = [f"t{i}" for i in range(count)]
    for kind in ("F16", "BF16", "F64"):
        arrays = [{"w": m["w"].astype(toys.NUMPY.get(kind, np.float32))} for m in (base, *experts)]
        paths = [
            toys.save(tmp_path / f"{i}.safetensors", model, dtypes={"w": kind})
            for i, model in enumerate(arrays)
        ]
        report = merge(name, {}, paths[0], paths[1:], tmp_path / "o.safetensors", ids=ids)
        expected = plain_extra.merge(name, report.params, base, experts, ids)["w"]
        tolerance = {"F16": 2e-3, "BF16": 2e-2, "F64": 1e-12}[kind]
        np.testing.assert_allclose(
            toys.load(tmp_path / "o.safetensors")["w"], expected, rtol=tolerance, atol=tolerance
        )
