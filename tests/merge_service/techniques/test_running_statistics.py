"""Running statistics of BatchNorm are averaged by every technique, and the report mentions them."""

import contextlib
from pathlib import Path

import numpy as np
import pytest

from merge_service.checkpoints import Checkpoint
from merge_service.engine import PartWorker, Split
from merge_service.errors import TechniqueError
from merge_service.merge import advance, fold, merge, retract
from merge_service.merging import Member, MergeJob
from merge_service.service import Merger
from merge_service.techniques import get, names
from tests.merge_service import measured, toys

BLOCK = "visual.layer1.0.bn1."
MEAN, VAR, SEEN = f"{BLOCK}running_mean", f"{BLOCK}running_var", f"{BLOCK}num_batches_tracked"


def model(rng: np.random.Generator, seen: int) -> dict[str, np.ndarray]:
    """A CLIP with a ResNet; its variances range from 1e-3 to 1e3, as real ones do."""
    return {
        **{f"visual.layer{s}.0.conv1.weight": rng.standard_normal((6, 5)).astype(np.float32) for s in (1, 2)},
        f"{BLOCK}weight": rng.standard_normal(40).astype(np.float32),
        MEAN: rng.standard_normal(40).astype(np.float32),
        VAR: np.exp(rng.uniform(-7, 7, 40)).astype(np.float32),
        SEEN: np.array(seen, np.int64),
        "transformer.resblocks.0.mlp.weight": rng.standard_normal((5, 5)).astype(np.float32),
        "transformer.resblocks.1.mlp.weight": rng.standard_normal((5, 5)).astype(np.float32),
    }


class World:
    def __init__(self, room: Path) -> None:
        rng = np.random.default_rng(0)
        base, *others = (model(rng, seen) for seen in range(5))
        self.models = [base, *(toys.kin(base, other) for other in others)]
        files = [toys.save(room / f"{i}.safetensors", one) for i, one in enumerate(self.models)]
        self.start, self.paths, self.out, self.room = files[0], files[1:], room / "out.safetensors", room

    def measure(self, name: str) -> None:
        for path in self.paths:
            measured.of_technique(name, path)

    def expected(self, tensor: str, count: int, weights=None) -> np.ndarray:
        return np.average([m[tensor].astype(np.float64) for m in self.models[1 : count + 1]], 0, weights)

    def holds_means(self, count: int, weights=None, **close) -> dict[str, np.ndarray]:
        found = toys.load(self.out)
        for tensor in (MEAN, VAR):
            np.testing.assert_allclose(
                found[tensor], self.expected(tensor, count, weights), rtol=1e-5, **close
            )
        assert found[VAR].min() >= 0 and found[SEEN] == 0
        return found


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


AVERAGED = [name for name in measured.GIVEN if name != "wise_ft"]


@pytest.mark.parametrize("name", AVERAGED)
def test_statistics_are_averaged_under_every_technique(world: World, name: str) -> None:
    count = get(name).arity or 4
    params = {"weight": 0.5} if name in ("slerp", "nuslerp", "dop") else {}
    world.measure(name)
    report = merge(name, params, world.start, world.paths[:count], world.out)
    world.holds_means(count)
    assert any("BatchNorm statistics" in note and "estimate them again" in note for note in report.notes)


@pytest.mark.parametrize("name", [n for n in AVERAGED if "fold" in get(n).forms])
def test_statistics_of_a_fold_are_averaged_with_its_weight(world: World, name: str) -> None:
    given = [p.name for p in get(name).params]
    params = {"weight": 0.25} if "weight" in given else {}
    world.measure(name)
    fold(name, params, world.start, *world.paths[:2], world.out)
    world.holds_means(2, [0.75, 0.25] if params else None)


def test_statistics_have_the_weights_of_the_experts(world: World) -> None:
    for name in ("average", "multislerp", "karcher"):
        merge(name, {"weights": [1, 2, 3, 4]}, world.start, world.paths, world.out)
        world.holds_means(4, [1, 2, 3, 4])


def test_statistics_of_a_mean_with_the_base_take_part_in_it(world: World) -> None:
    merge("wise_ft", {"weight": 0.25}, world.start, world.paths, world.out)
    expected = 0.75 * world.models[0][VAR] + 0.25 * world.expected(VAR, 4)
    np.testing.assert_allclose(toys.load(world.out)[VAR], expected, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in names() if "stream" in get(n).forms])
def test_stream_of_statistics_is_the_merge_of_them(world: World, name: str) -> None:
    world.measure(name)
    merge(name, {}, world.start, world.paths, world.out, ids=[*"0123"])
    whole, state = world.out.read_bytes(), None
    for i, path in enumerate(world.paths):
        after = world.room / f"s{i}.safetensors"
        advance(name, {}, world.start, path, world.out, expert_id=str(i), state_in=state, state_out=after)
        state = after
    assert world.out.read_bytes() == whole


def test_retracted_expert_leaves_the_mean_of_the_others_and_no_negative_variance(world: World) -> None:
    huge = {**world.models[1], VAR: np.full(40, 1e7, np.float32)}
    small = {**world.models[2], VAR: np.full(40, 1e-6, np.float32)}
    paths = [toys.save(world.room / f"x{i}.safetensors", m) for i, m in enumerate((huge, small))]
    states = [world.room / f"s{i}.safetensors" for i in range(3)]
    for i, path in enumerate(paths):
        advance("task_arithmetic", {}, world.start, path, None, expert_id=str(i), state_in=states[i - 1] if i else None, state_out=states[i])  # fmt: skip
    retract("task_arithmetic", {}, world.start, paths[0], world.out, expert_id="0", state_in=states[1], state_out=states[2])  # fmt: skip
    found = toys.load(world.out)
    np.testing.assert_allclose(found[MEAN], small[MEAN], atol=1e-5)
    assert found[VAR].min() >= 0 and found[VAR].max() < 2


@pytest.mark.parametrize("name", ["ties", "iso_c", "pcb", "sce"])
def test_statistics_of_a_merge_split_over_workers_are_the_same(world: World, name: str) -> None:
    @contextlib.contextmanager
    def hire(parts):
        workers = [PartWorker(part) for part in parts]
        yield lambda method, *given: [getattr(worker, method)(*given) for worker in workers]

    merge(name, {}, world.start, world.paths, world.out)
    alone = world.out.read_bytes()
    merge(name, {}, world.start, world.paths, world.out, split=Split(3, hire))
    assert world.out.read_bytes() == alone


@pytest.mark.parametrize("threads", [1, 3])
def test_statistics_on_a_device_are_the_same(world: World, threads: int) -> None:
    merge("dare_ties", {}, world.start, world.paths, world.out)
    alone = world.out.read_bytes()
    merge("dare_ties", {}, world.start, world.paths, world.out, device="cpu", threads=threads)
    assert world.out.read_bytes() == alone


def test_statistics_do_not_count_in_thresholds(world: World) -> None:
    merge("ties", {"density": 0.2}, world.start, world.paths, world.out)
    whole = toys.load(world.out)
    for i, one in enumerate(world.models):
        bare = {name: value for name, value in one.items() if name not in (MEAN, VAR)}
        toys.save(world.room / f"{i}.safetensors", bare)
    merge("ties", {"density": 0.2}, world.start, world.paths, world.out)
    for name, value in toys.load(world.out).items():
        assert value.tobytes() == whole[name].tobytes(), name


def test_state_that_sums_statistics_as_older_versions_did_is_refused(world: World) -> None:
    state, older = world.room / "s.safetensors", world.room / "older.safetensors"
    advance("task_arithmetic", {}, world.start, world.paths[0], None, expert_id="0", state_in=None, state_out=state)  # fmt: skip
    with Checkpoint.open(state) as held:
        kept = {n.replace("mean:", "sum:"): held.read(n).copy() for n in held.tensors}
        toys.save(older, kept, dict(held.metadata))
    with pytest.raises(
        TechniqueError, match=r"does not hold mean of .*running_mean.*another version wrote it"
    ):
        advance("task_arithmetic", {}, world.start, world.paths[1], None, expert_id="1", state_in=older, state_out=state)  # fmt: skip


@pytest.mark.parametrize("form", ["merge", "fold"])
def test_record_of_a_merge_step_says_that_statistics_want_re_estimation(world: World, form: str) -> None:
    members = [Member(str(i), path, str(i)) for i, path in enumerate([world.start, *world.paths])]
    job = MergeJob(
        "m", "ties", {}, form, members[0], tuple(members[1:3]), 1, str(world.room), str(world.room)
    )
    result = Merger().merge(job, world.out).result
    assert any("estimate them again" in note for note in result["notes"]) and "merged_norm" in result
