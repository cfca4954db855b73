"""Tensors with several names: found in every form, and masked, counted and written once."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest

from merge_service.checkpoints import Checkpoint, recorded
from merge_service.checkpoints.ties import BrokenTie, tie
from merge_service.engine import PartWorker, Split
from merge_service.errors import IncompatibleCheckpoint
from merge_service.merge import advance, fold, merge, replace, retract
from merge_service.merging import Member, Rules
from merge_service.merging.derivation import Derivation, Operator
from merge_service.merging.geometry import geometry
from merge_service.merging.stream import StreamCache
from merge_service.similarity import similarity
from merge_service.techniques import get, names
from tests.merge_service import toys

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def model(rng: np.random.Generator, *, head: bool = True, untied: bool = False) -> dict[str, np.ndarray]:
    embed = rng.standard_normal((23, 11)).astype(np.float32)
    other = rng.standard_normal((23, 11)).astype(np.float32)
    tensors = {HEAD: other if untied else embed} if head else {}
    blocks = {
        f"model.layers.{i}.mlp.weight": rng.standard_normal((7, 11)).astype(np.float32) for i in range(2)
    }
    norms = {f"model.layers.{i}.norm.weight": np.ones(11, np.float32) for i in range(2)}
    return {**tensors, EMBED: embed, **blocks, **norms}


class World:
    """A base and four experts, tied in every form: by equal bytes, by an alias that is left out, or by metadata."""

    def __init__(self, room: Path, base: str = "both", experts: str = "both") -> None:
        rng = np.random.default_rng(3)
        self.room, self.out = room, room / "out.safetensors"
        origin, *others = (model(rng) for _ in range(5))
        models = [origin, *(toys.kin(origin, other) for other in others)]
        self.origin = origin
        self.start = self.save("base", models[0], base)
        self.paths = [self.save(f"e{i}", one, experts) for i, one in enumerate(models[1:])]

    def save(self, name: str, tensors: dict[str, np.ndarray], form: str = "both") -> Path:
        kept = {key: value for key, value in tensors.items() if form != "absent" or key != HEAD}
        said = {"map": {HEAD: EMBED}, "list": [[EMBED, HEAD]]}.get(form)
        metadata = {"format": "pt", **({"tied": json.dumps(said)} if said else {})}
        return toys.save(self.room / f"{name}.safetensors", kept, metadata)

    def merge(self, name: str, params=None, paths=None, **options) -> dict[str, np.ndarray]:
        paths = self.paths if paths is None else paths
        if get(name).arity == 2:
            paths = paths[:2]
        merge(name, params or {}, self.start, paths, self.out, **options)
        return toys.load(self.out)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


FORMS = [
    ("both", "both"),
    ("both", "absent"),
    ("absent", "both"),
    ("map", "both"),
    ("list", "list"),
    ("map", "absent"),
]


@pytest.mark.parametrize("forms", FORMS, ids="-".join)
@pytest.mark.parametrize("name", [n for n in names() if not get(n).evidence])
def test_tied_tensors_merge_as_the_one_they_are_however_files_say_so(
    tmp_path: Path, name: str, forms
) -> None:
    (tmp_path / "one").mkdir()
    one = World(tmp_path / "one", "absent", "absent").merge(name)
    found = World(tmp_path, *forms).merge(name)
    for tensor, value in one.items():
        assert found[tensor].tobytes() == value.tobytes(), tensor
    assert (HEAD in found) == (forms[0] != "absent")
    if HEAD in found:
        assert found[HEAD].tobytes() == one[EMBED].tobytes()


def test_tied_tensors_count_once_in_norms_cosines_and_conflicts(tmp_path: Path) -> None:
    worlds = {}
    for form in ("absent", "both"):
        (tmp_path / form).mkdir()
        world = worlds[form] = World(tmp_path / form, form, form)
        world.merge("ties")
        assert world.merge("average") is not None
    first, second = worlds.values()
    norms = [geometry(one.start, one.out, one.paths[0]) for one in (first, second)]
    assert norms[0] == norms[1]
    angles = [similarity(one.start, dict(enumerate(map(str, one.paths)))).cosine() for one in (first, second)]
    np.testing.assert_array_equal(*angles)


@pytest.mark.parametrize("name", [n for n in names() if "stream" in get(n).forms and not get(n).evidence])
@pytest.mark.parametrize("forms", FORMS[:3], ids="-".join)
def test_stream_of_tied_models_is_the_merge_of_them(tmp_path: Path, name: str, forms) -> None:
    world = World(tmp_path, *forms)
    whole = {t: v.tobytes() for t, v in world.merge(name, ids=["0", "1", "2", "3"]).items()}
    state = None
    for i, path in enumerate(world.paths):
        after = tmp_path / f"state{i}.safetensors"
        advance(name, {}, world.start, path, world.out, expert_id=str(i), state_in=state, state_out=after)
        state = after
    assert {t: v.tobytes() for t, v in toys.load(world.out).items()} == whole
    with Checkpoint.open(state) as held:
        assert not any(n.endswith(f":{HEAD}") for n in held.tensors)


def test_retract_and_replace_keep_tied_tensors_one(world: World) -> None:
    state, after = (world.room / f"{n}.safetensors" for n in ("state", "after"))
    steps = [None, *(world.room / f"s{i}.safetensors" for i in range(3))]
    params = {"density": 0.5}
    for i, path in enumerate(world.paths[:3]):
        advance(
            "dare",
            params,
            world.start,
            path,
            None,
            expert_id=str(i),
            state_in=steps[i],
            state_out=steps[i + 1],
        )
    retract(
        "dare",
        params,
        world.start,
        world.paths[0],
        world.out,
        expert_id="0",
        state_in=steps[3],
        state_out=state,
    )
    found = toys.load(world.out)
    assert found[HEAD].tobytes() == found[EMBED].tobytes()
    rest = world.merge("dare", params, world.paths[1:3], ids=["1", "2"])
    np.testing.assert_allclose(found[EMBED], rest[EMBED], atol=1e-5)
    replace(
        "dare", params, world.start, world.paths[1], world.paths[3], world.out, expert_id="1", state_in=state, state_out=after
    )  # fmt: skip
    found = toys.load(world.out)
    assert found[HEAD].tobytes() == found[EMBED].tobytes()


def test_expert_that_is_not_tied_makes_them_two_tensors_for_all(world: World) -> None:
    untied = world.save("untied", toys.kin(world.origin, model(np.random.default_rng(9), untied=True)))
    paths = [*world.paths[:2], untied]
    found = world.merge("dare_ties", {"density": 0.5}, paths, ids=["0", "1", "2"])
    assert not np.array_equal(found[HEAD], found[EMBED])
    steps = [None, *(world.room / f"s{i}.safetensors" for i in range(3))]
    with pytest.raises(
        BrokenTie, match=r"hold lm_head\.weight and model\.embed_tokens\.weight as one tensor, .*untied"
    ):
        for i, path in enumerate(paths):
            advance("dare_ties", {"density": 0.5}, world.start, path, None, expert_id=str(i), state_in=steps[i], state_out=steps[i + 1])  # fmt: skip
    cache = StreamCache(world.room / "scratch")
    members = [Member(str(i), path, str(i)) for i, path in enumerate([*paths, world.paths[3]])]
    for count in (1, 2, 3, 4):
        operator = Operator.of("dare_ties", {"density": 0.5}, "merge")
        cache.merge(Derivation(operator, world.start, tuple(members[:count])), "b", world.out)
        streamed = toys.load(world.out)
        whole = world.merge("dare_ties", {"density": 0.5}, [m.path for m in members[:count]], ids=[m.id for m in members[:count]])  # fmt: skip
        assert {t: v.tobytes() for t, v in streamed.items()} == {t: v.tobytes() for t, v in whole.items()}
    cache.close()


def test_ordered_technique_with_an_expert_that_is_not_tied_merges_them_as_two(world: World) -> None:
    untied = world.save("untied", toys.kin(world.origin, model(np.random.default_rng(9), untied=True)))
    found = world.merge("opcm", {}, [world.paths[0], untied])
    assert not np.array_equal(found[HEAD], found[EMBED])


@contextlib.contextmanager
def hire(parts):
    workers = [PartWorker(part) for part in parts]
    yield lambda method, *given: [getattr(worker, method)(*given) for worker in workers]


@pytest.mark.parametrize("name", ["ties", "dare_ties", "pcb"])
def test_merge_split_over_workers_keeps_tied_tensors_one(world: World, name: str) -> None:
    alone = world.merge(name)
    apart = world.merge(name, split=Split(3, hire))
    assert {t: v.tobytes() for t, v in apart.items()} == {t: v.tobytes() for t, v in alone.items()}


def test_fold_of_tied_models_is_one_tensor(world: World) -> None:
    fold("dare_ties", {}, world.start, *world.paths[:2], world.out)
    found = toys.load(world.out)
    assert found[HEAD].tobytes() == found[EMBED].tobytes()


def test_tensors_of_one_value_and_scalars_are_never_tied(world: World) -> None:
    checkpoints = [Checkpoint.open(path) for path in (world.start, *world.paths)]
    assert tie(checkpoints[0], checkpoints[1:]) == {HEAD: EMBED}


def test_name_of_tied_tensors_is_the_embedding_whatever_the_order_in_the_file(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32)
    for group in (
        ("lm_head.weight", "model.embed_tokens.weight"), ("transformer.wte.weight", "lm_head.weight"),
        ("decoder.embed_tokens.weight", "lm_head.weight", "shared.weight"), ("embed_out.weight", "gpt_neox.embed_in.weight"),
    ):  # fmt: skip
        path = toys.save(tmp_path / "m.safetensors", dict.fromkeys(group, values))
        with Checkpoint.open(path) as one:
            source = {"lm_head.weight": 1, "transformer.wte.weight": 0, "embed_out.weight": 1}.get(
                group[0], 2
            )
            assert set(tie(one, []).values()) == {group[source]}


def test_tied_tensors_that_all_started_at_zero_are_found_by_what_experts_hold(tmp_path: Path) -> None:
    names = ("cls.predictions.bias", "cls.predictions.decoder.bias", "w")
    zero = np.zeros(9, np.float32)
    moved = np.arange(9, dtype=np.float32)
    base = toys.save(tmp_path / "b.safetensors", dict.fromkeys(names, zero))
    expert = toys.save(tmp_path / "e.safetensors", {names[0]: moved, names[1]: moved, "w": zero + 1})
    with Checkpoint.open(base) as start, Checkpoint.open(expert) as new:
        assert tie(start, [new]) == {names[1]: names[0]}


def test_output_bias_that_is_zero_in_the_base_may_be_left_out_by_an_expert(tmp_path: Path) -> None:
    bias, copy = "lm_head.bias", "lm_head.decoder.bias"
    zero, moved = np.zeros(9, np.float32), np.arange(9, dtype=np.float32)
    both = toys.save(tmp_path / "b.safetensors", {bias: zero, copy: zero})
    one = toys.save(tmp_path / "e.safetensors", {bias: moved})
    merge("average", {}, both, [one, one], tmp_path / "o.safetensors")
    assert all(np.array_equal(value, moved) for value in toys.load(tmp_path / "o.safetensors").values())
    merge("average", {}, one, [both, both], tmp_path / "o.safetensors")
    assert toys.load(tmp_path / "o.safetensors").keys() == {bias}


@pytest.mark.parametrize("said", [True, False], ids=["with metadata", "without"])
@pytest.mark.parametrize("base", [EMBED, HEAD])
def test_files_that_keep_another_name_of_one_tensor_merge_as_that_tensor(
    world: World, base: str, said: bool
) -> None:
    def keep(path: Path, name: str) -> Path:
        """As written by `safetensors.torch.save_model`, which keeps one name and records the other."""
        other = HEAD if name == EMBED else EMBED
        tensors = {key: value for key, value in toys.load(path).items() if key != other}
        return toys.save(path, tensors, {"format": "pt", **({other: name} if said else {})})

    expected = world.merge("task_arithmetic")[EMBED]
    world.start = keep(world.start, base)
    for path, name in zip(world.paths, (EMBED, HEAD, EMBED)):  # the fourth holds both
        keep(path, name)
    found = world.merge("task_arithmetic")
    assert {EMBED, HEAD} & found.keys() == {base} and np.array_equal(found[base], expected)
    apart = world.merge("task_arithmetic", split=Split(3, hire))
    assert {t: v.tobytes() for t, v in apart.items()} == {t: v.tobytes() for t, v in found.items()}


def test_workers_read_what_an_expert_left_out_where_another_has_two_tensors(tmp_path: Path) -> None:
    world, rng = World(tmp_path), np.random.default_rng(0)
    left_out = world.save("left_out", toys.kin(world.origin, model(rng)), "absent")
    apart = world.save("apart", toys.kin(world.origin, model(rng, untied=True)))
    alone = world.merge("average", paths=[left_out, apart])
    split = world.merge("average", paths=[left_out, apart], split=Split(3, hire))
    assert {t: v.tobytes() for t, v in split.items()} == {t: v.tobytes() for t, v in alone.items()}


def test_every_name_of_a_group_is_lent_whichever_the_file_kept(tmp_path: Path) -> None:
    names = ("decoder.embed_tokens.weight", "encoder.embed_tokens.weight", HEAD, "shared.weight")
    values = np.arange(9, dtype=np.float32)
    base = toys.save(tmp_path / "b.safetensors", dict.fromkeys(names, values))
    expert = toys.save(tmp_path / "e.safetensors", {HEAD: values + 1})
    merge("average", {}, base, [expert], tmp_path / "o.safetensors", rules=Rules(any_base=True))
    assert all(np.array_equal(one, values + 1) for one in toys.load(tmp_path / "o.safetensors").values())


def test_missing_tensor_of_a_block_is_never_filled_in_from_an_equal_one(tmp_path: Path) -> None:
    values = np.arange(9, dtype=np.float32)
    layers = {f"layers.{i}.w": values for i in range(2)}
    base = toys.save(tmp_path / "b.safetensors", layers)
    expert = toys.save(tmp_path / "e.safetensors", {"layers.0.w": values + 1})
    with pytest.raises(IncompatibleCheckpoint, match=r"layers\.1\.w is missing"):
        merge("average", {}, base, [expert], tmp_path / "o.safetensors")


@pytest.mark.parametrize("base", [{"head": False}, {"untied": True}], ids=["tied base", "tied expert"])
def test_output_layer_that_only_one_leaves_out_is_refused_with_the_way_out(tmp_path: Path, base) -> None:
    world, rng = World(tmp_path), np.random.default_rng(0)
    kin = [toys.kin(world.origin, model(rng, **how)) for how in ({"head": False}, {"untied": True})]
    tied, apart = (world.save(name, one) for name, one in zip(("tied", "apart"), kin))
    start, expert = (tied, apart) if "head" in base else (apart, tied)
    with pytest.raises(
        IncompatibleCheckpoint,
        match=r"tied\.safetensors with a copy of model\.embed_tokens\.weight under lm_head",
    ):
        merge("average", {}, start, [expert], world.out)
    held = toys.load(tied)
    mended = world.save("mended", {**held, HEAD: held[EMBED]})
    merge("average", {}, *((mended, [apart]) if "head" in base else (apart, [mended])), world.out)


def test_entry_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    for entry, why in (
        ('"x"', "not a JSON map"), ('{"a": "b", "b": "a"}', "not a tensor of its own"), ("[1]", "not a JSON map"),
        ('{"a": "c"}', "another shape or dtype"),
    ):  # fmt: skip
        tensors = {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32), "c": np.zeros(3, np.float32)}
        path = toys.save(tmp_path / "m.safetensors", tensors, {"tied": entry})
        with Checkpoint.open(path) as one, pytest.raises(IncompatibleCheckpoint, match=why):
            recorded(one)


def test_base_that_says_tied_but_differs_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.start = world.save("base", model(np.random.default_rng(1), untied=True), "map")
    with pytest.raises(IncompatibleCheckpoint, match="differ here"):
        world.merge("average")


def test_report_says_what_is_tied(world: World) -> None:
    report = merge("average", {}, world.start, world.paths, world.out)
    assert report.notes == (f"tied tensors are merged as one: {HEAD} is {EMBED}",)
    assert report.parameters == 23 * 11 + 2 * 7 * 11 + 2 * 11
