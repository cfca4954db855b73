"""Laws that hold for every technique unless its declaration gives a reason why not (property numbers as in `Technique.breaks`)."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from merge_service import techniques
from merge_service.blocks import search
from merge_service.blocks import spans as engine
from merge_service.blocks.masks import kept, tensor_key
from merge_service.checkpoints import Checkpoint
from merge_service.errors import TechniqueError
from merge_service.merge import advance, fold, merge
from merge_service.merging import Rules
from merge_service.techniques.families.averages import Mean
from tests.merge_service import measured, toys
from tests.merge_service import plain_extra as plain

PARAMS = {
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "breadcrumbs_ties": {"density": 0.5, "outliers": 0.1},
    "task_arithmetic": {"scale": 0.5},
    "lines_ties": {"density": 0.5},
    "lines_dare_ties": {"density": 0.5},
    "lines_breadcrumbs_ties": {"density": 0.5, "outliers": 0.1},
    "breadcrumbs": {"density": 0.5, "outliers": 0.1},
    "sce": {"density": 0.5},
    "pcb": {"density": 0.5},
    "nearswap": {"threshold": 0.5},
}
UNCLAMPED = {"logit_scale"}
NOTHING = {name: techniques.get(name).scale.name for name in measured.GIVEN} | {
    "average": "weight",
    "regmean": "weight",
    "fisher": "weight",
    "slerp": "weight",
    "nearswap": "threshold",
    **dict.fromkeys(("nuslerp", "multislerp", "karcher"), "weight"),
}
"""The parameter that makes a technique do nothing when it is zero."""
models = st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from([2, 64]))
quick = settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def obey(law: str):
    """Every technique that does not declare an exception to the law.

    Mirrored experts have other statistics than the experts, so that P7 and P8 say nothing of techniques that use any.
    """
    names = [n for n in measured.GIVEN if law not in techniques.get(n).breaks]
    mirrors = law in ("P7", "P8")
    return pytest.mark.parametrize("name", [n for n in names if not (mirrors and techniques.get(n).evidence)])


def has(name: str, param: str) -> bool:
    return any(param == one.name for one in techniques.get(name).params)


class Room:
    """A base and experts on disk, from a seed."""

    def __init__(self, where: Path, seed: int, count: int, spread: int, name: str) -> None:
        rng = np.random.default_rng(seed)
        self.where = where
        self.base = toys.towers(rng)
        self.base["visual.ln_pre.bias"][:2] = [-0.0, 0.0]
        self.experts = [
            toys.moved(rng, self.base, spread=spread, frozen=("visual.ln_pre.bias",))
            for _ in range(techniques.get(name).arity or count)
        ]
        self.ids = [f"t{i}" for i in range(1, len(self.experts) + 1)]
        self.name, self.params = name, PARAMS.get(name, {})

    @property
    def needs_base(self) -> bool:
        return "base" in techniques.get(self.name).needs

    def path(self, model: dict, label: str) -> Path:
        path = toys.save(self.where / f"{label}.safetensors", model, {"format": "pt", "origin": "toy"})
        return measured.of_technique(self.name, path)

    def merge(
        self, experts: list[dict] | None = None, ids=None, base=None, label="out", **params
    ) -> dict[str, np.ndarray]:
        paths = [self.path(e, f"e{i}") for i, e in enumerate(self.experts if experts is None else experts)]
        start = self.path(self.base if base is None else base, "base")
        out = self.where / f"{label}.safetensors"
        merge(self.name, self.params | params, start, paths, out, ids=ids or self.ids[: len(paths)])
        return toys.load(out)

    def mirrored(self, factor: float) -> list[dict]:
        """The experts with their task vectors multiplied."""
        return [
            {
                n: self.base[n] + np.float32(factor) * (v - self.base[n]) if v.dtype == np.float32 else v
                for n, v in e.items()
            }
            for e in self.experts
        ]

    def floats(self) -> list[str]:
        return [n for n, v in self.base.items() if v.dtype == np.float32 and n not in UNCLAMPED]


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("laws")


def same_bits(one: dict, other: dict) -> None:
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize("name", measured.GIVEN)
@quick
@given(model=models)
def test_p1_nothing_merged_is_the_base_to_the_bit(where: Path, name: str, model) -> None:
    room = Room(where, *model, name)
    same_bits(room.merge([]), room.base)
    if "P1" in techniques.get(name).breaks:
        return
    if room.needs_base:
        zero = {"lines_alpha": 0, "lines_beta": 0} if name.startswith("lines_") else {NOTHING[name]: 0}
        same_bits(room.merge(**zero), room.base)
    else:
        start, new = room.path(room.base, "base"), room.path(room.experts[0], "new")
        fold(name, {NOTHING[name]: 0}, start, start, new, where / "out.safetensors")
        same_bits(toys.load(where / "out.safetensors"), room.base)


@obey("P2")
@quick
@given(model=models)
def test_p2_copies_of_one_expert_give_it_back(where: Path, name: str, model) -> None:
    room = Room(where, *model, name)
    result = room.merge([room.experts[0]] * len(room.experts))
    same_bits(result, room.experts[0] | {n: result[n] for n in UNCLAMPED})


@obey("P3")
@quick
@given(model=models, order=st.randoms(use_true_random=False))
def test_p3_the_order_of_experts_does_not_matter(where: Path, name: str, model, order) -> None:
    room = Room(where, *model, name)
    shuffled = list(zip(room.experts, room.ids))
    order.shuffle(shuffled)
    one, other = room.merge(), room.merge([e for e, _ in shuffled], [i for _, i in shuffled])
    technique = techniques.get(name)
    rule = technique.rule(technique.resolve(room.params, "merge"))
    exact = not has(name, "seed") and not rule.whole and not isinstance(rule, Mean)
    for tensor in room.floats():
        tied = np.zeros(room.base[tensor].shape, bool)
        if name == "magmax":  # of equal magnitudes the later wins, by its definition
            sizes = np.sort(np.abs([e[tensor] - room.base[tensor] for e in room.experts]), axis=0)
            tied = np.any(sizes[1:] == sizes[:-1], axis=0)
        np.testing.assert_allclose(
            one[tensor][~tied], other[tensor][~tied], rtol=0, atol=0 if exact else 4e-6
        )


@obey("P4")
@quick
@given(model=models)
def test_p4_one_expert_still_meets_the_operator(where: Path, name: str, model) -> None:
    room = Room(where, *model, name)
    result = room.merge(room.experts[:1])
    if name in measured.BY_GOLDEN:  # each of these gives its only expert back, apart from `scale`
        return
    params = techniques.get(name).resolve(room.params, "merge")
    for tensor, value in plain.merge(name, params, room.base, room.experts[:1], room.ids[:1]).items():
        np.testing.assert_allclose(result[tensor], value, rtol=1e-6, atol=1e-6, err_msg=tensor)


@obey("P5")
@quick
@given(model=models)
def test_p5_and_p13_a_stream_writes_the_bytes_of_the_batch(where: Path, name: str, model) -> None:
    room = Room(where, *model, name)
    start, state = room.path(room.base, "base"), None
    for number, expert in enumerate(room.experts, 1):
        room.merge(room.experts[:number], label="batch")
        target, again = where / f"state-{number}.safetensors", where / "again.safetensors"
        for keep in (target, again):  # the second time from the state as it came back from disk
            advance(
                name, room.params, start, room.path(expert, "new"), where / "stream.safetensors",
                expert_id=room.ids[number - 1], state_in=state, state_out=keep,
            )  # fmt: skip
        assert target.read_bytes() == again.read_bytes()
        assert (where / "stream.safetensors").read_bytes() == (where / "batch.safetensors").read_bytes()
        state = target


@pytest.mark.parametrize("name", measured.GIVEN)
def test_p6_blocks_and_threads_change_no_bit(where: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "GATHER", 1 << 10)
    room = Room(where, 5, 3, 2, name)
    rng = np.random.default_rng(5)
    for model in (room.base, *room.experts):
        model["visual.transformer.resblocks.1.attn.weight"] = toys.dyadic(rng, (250, 701), 64)
    paths = [room.path(e, f"e{i}") for i, e in enumerate(room.experts)]
    start, seen = room.path(room.base, "base"), set()
    for block, threads in ((1, 1), (engine.GRAIN, 3), (2 * engine.GRAIN, 2), (1 << 20, 1)):
        out = where / "out.safetensors"
        any_base = Rules(any_base=True)  # one large matrix of each is drawn anew
        report = merge(name, room.params, start, paths, out, threads=threads, block=block, rules=any_base)
        seen.add((out.read_bytes(), report.merged_norm))
    assert len(seen) == 1


@obey("P7")
@quick
@given(model=models)
def test_p7_twice_the_task_vectors_move_twice_as_far(where: Path, name: str, model) -> None:
    room = Room(where, *model, name)
    once, twice = room.merge(), room.merge(room.mirrored(2))
    for tensor in room.floats():
        base = room.base[tensor]
        np.testing.assert_allclose(twice[tensor] - base, 2 * (once[tensor] - base), rtol=1e-6, atol=4e-6)


@obey("P8")
@quick
@given(model=models)
def test_p8_opposite_task_vectors_move_the_opposite_way(where: Path, name: str, model) -> None:
    room = Room(where, *model, name)
    there, back = room.merge(), room.merge(room.mirrored(-1))
    for tensor in room.floats():
        base = room.base[tensor]
        np.testing.assert_allclose(back[tensor] - base, base - there[tensor], rtol=1e-6, atol=4e-6)


@obey("P9")
@quick
@given(model=models)
def test_p9_what_no_expert_moved_stays_to_the_bit(where: Path, name: str, model) -> None:
    room = Room(where, *model, name)
    result = room.merge()
    for tensor in room.floats():
        still = np.all([e[tensor] == room.base[tensor] for e in room.experts], axis=0)
        assert result[tensor][still].tobytes() == room.base[tensor][still].tobytes(), tensor


@obey("P10")
@quick
@given(model=models)
def test_p10_results_stay_between_the_experts_and_the_base(where: Path, name: str, model) -> None:
    room = Room(where, *model, name)
    result = room.merge()
    members = room.experts + ([room.base] if room.needs_base else [])
    for tensor in room.floats():
        stack = np.array([m[tensor] for m in members])
        assert np.all(result[tensor] >= stack.min(axis=0) - 1e-6), tensor
        assert np.all(result[tensor] <= stack.max(axis=0) + 1e-6), tensor


@pytest.mark.parametrize("name", measured.GIVEN)
def test_p11_form_integers_and_metadata_are_kept(where: Path, name: str) -> None:
    room = Room(where, 11, 2, 64, name)
    other = room.experts[-1] | {"position_ids": np.zeros(6, np.int64)}
    result = room.merge([*room.experts[:-1], other])
    assert [(n, v.dtype, v.shape) for n, v in result.items()] == [
        (n, v.dtype, v.shape) for n, v in room.base.items()
    ]
    np.testing.assert_array_equal(result["position_ids"], room.base["position_ids"])
    assert all(np.isfinite(v).all() for v in result.values())
    with Checkpoint.open(where / "out.safetensors") as merged:
        assert merged.metadata["format"] == "pt" and merged.metadata["origin"] == "toy"
    record = toys.made(where / "out.safetensors")
    assert record["technique"] == name and record["inputs"] == [{"id": i} for i in room.ids]


@pytest.mark.parametrize("name", measured.GIVEN)
def test_p12_an_expert_counts_once(where: Path, name: str) -> None:
    room = Room(where, 12, 2, 64, name)
    with pytest.raises(TechniqueError, match="'t1' is given twice"):
        room.merge(ids=["t1", "t1"])
    if "stream" not in techniques.get(name).forms:
        return
    start, new, state = (
        room.path(room.base, "base"),
        room.path(room.experts[0], "new"),
        where / "state.safetensors",
    )
    advance(name, room.params, start, new, None, expert_id="t1", state_in=None, state_out=state)
    with pytest.raises(TechniqueError, match="'t1' is already in"):
        advance(
            name,
            room.params,
            start,
            new,
            None,
            expert_id="t1",
            state_in=state,
            state_out=where / "x.safetensors",
        )
    assert not (where / "x.safetensors").exists()


@pytest.mark.parametrize("name", measured.GIVEN)
def test_p14_only_the_seed_decides_what_is_random(where: Path, name: str) -> None:
    room = Room(where, 14, 3, 64, name)
    same_bits(room.merge(), room.merge())
    if has(name, "seed"):
        other = room.merge(seed=1)
        assert any(other[n].tobytes() != v.tobytes() for n, v in room.merge(seed=0).items())


@pytest.mark.parametrize("name", [n for n in measured.GIVEN if has(n, "count_frozen")])
def test_p15_frozen_tensors_change_nothing_when_they_do_not_count(where: Path, name: str) -> None:
    room = Room(where, 15, 3, 64, name)
    params = {"count_frozen": False, "granularity": "tower"}
    whole = room.merge(**params)
    bare = [{n: v for n, v in e.items() if n != "visual.ln_pre.bias"} for e in room.experts]
    base = {n: v for n, v in room.base.items() if n != "visual.ln_pre.bias"}
    without = room.merge(bare, base=base, **params)
    for tensor, value in without.items():
        assert whole[tensor].tobytes() == value.tobytes(), tensor


STREAMED = [
    "average",
    "magmax",
    "breadcrumbs_ties",
    "dare_ties",
    "breadcrumbs",
    "dare",
    "della",
    "ram",
    "random_mix",
    "wise_ft",
]
JOINT = ["consensus", "sce", "pcb"]


@pytest.mark.parametrize("name", STREAMED + JOINT)
def test_p16_memory_does_not_grow_with_the_experts_or_the_model(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in ("BINS", "COUNTS", "SAMPLE"):  # in proportion to a small model
        monkeypatch.setattr(search, bound, 1 << 14)
    rng = np.random.default_rng(0)
    paths = []
    for number in range(7):
        tensors = {
            "a": rng.standard_normal((1500, 1000), np.float32),
            "b": rng.standard_normal((500, 1000), np.float32),
        }
        paths.append(toys.save(tmp_path / f"{number}.safetensors", tensors))
    peaks, out = [], tmp_path / "out.safetensors"
    options = {"block": engine.GRAIN, "rules": Rules(any_base=True)}
    merge(name, {}, paths[0], paths[1:3], out, **options)  # type: ignore[arg-type]  # compiled loops are loaded once, whatever is merged
    for count in (2, 6):
        tracemalloc.start()
        merge(name, {}, paths[0], paths[1 : count + 1], out, **options)  # type: ignore[arg-type]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    if name in JOINT:  # a few blocks of every expert, where the experts themselves would add 32 MB
        assert peaks[1] < peaks[0] + 4_000_000
    else:
        assert max(peaks) < 7_500_000 < paths[0].stat().st_size
        assert peaks[1] < peaks[0] * 1.1 + 100_000


def test_random_masks_keep_the_right_share_independently_and_without_bias() -> None:
    block, density = np.zeros(200_000), 0.3
    size = block.size
    one, other = (kept(np, tensor_key(0, who, "w"), 0, block, density) for who in ("t1", "t2"))
    deviation = np.sqrt(density * (1 - density) / size)
    assert abs(one.mean() - density) < 4 * deviation and abs(other.mean() - density) < 4 * deviation
    assert abs((one & other).mean() - density**2) < 4 * deviation
    masks = np.array([kept(np, tensor_key(seed, "t1", "w"), 0, block[:50], density) for seed in range(4000)])
    assert np.all(np.abs(masks.mean(axis=0) / density - 1) < 4.5 * np.sqrt((1 - density) / density / 4000))
