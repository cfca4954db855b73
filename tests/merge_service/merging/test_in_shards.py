"""Merges into shards: the numbers and bytes of a merge into one file, by any number of workers, wherever they were stopped."""

from pathlib import Path

import numpy as np
import pytest

from merge_service.checkpoints import Checkpoint
from merge_service.checkpoints.folders import staged
from merge_service.engine import Split
from merge_service.errors import CheckpointError, NonFiniteCheckpoint
from merge_service.merge import MergeReport, merge
from tests.merge_service.parts import here
from tests.merge_service.toys import load, save

SHARD = 500
NAMES = [f"{tower}.layers.{at}.weight" for tower in ("visual", "text") for at in range(3)]


class Stopped(BaseException):
    """In the place of a kill."""


class World:
    """A base and three experts whose votes often cancel exactly, with a tied tensor whose names are in different shards, and integers."""

    def __init__(self, room: Path) -> None:
        self.room, rng = room, np.random.default_rng(4)
        base = {name: 3 * self._draw(rng, 12, 9) for name in NAMES} | {"a.steps": np.arange(5)}
        base = {"visual.embed.weight": 3 * self._draw(rng, 20, 9), **base}
        self.models = [
            base,
            *(
                {n: v + self._draw(rng, *v.shape) if v.ndim > 1 else v for n, v in base.items()}
                for _ in range(3)
            ),
        ]
        self.base, *self.experts = (
            self._saved(f"{at}.safetensors", one) for at, one in enumerate(self.models)
        )

    def _draw(self, rng: np.random.Generator, *shape: int) -> np.ndarray:
        return rng.integers(-2, 3, shape).astype(np.float32)

    def _saved(self, name: str, model: dict[str, np.ndarray]) -> Path:
        narrow = dict.fromkeys(NAMES[:2], "BF16")
        return save(
            self.room / name, {**model, "text.head.weight": model["visual.embed.weight"]}, dtypes=narrow
        )

    def merge(
        self, out: str, technique: str, params: dict, split: int = 0, shard: int | None = SHARD, **options
    ) -> MergeReport:
        over = Split(split, here) if split else None
        return merge(
            technique,
            params,
            self.base,
            self.experts,
            self.room / out / "m.safetensors",
            split=over,
            shard_bytes=shard,
            **options,
        )

    def files(self, out: str) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in sorted((self.room / out).iterdir())}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


CASES = [
    ("average", {}),
    ("ties", {"density": 1.0, "granularity": "model"}),
    ("ties", {"density": 0.7, "granularity": "tensor"}),
    ("dare_ties", {"density": 0.5}),
    ("iso_c", {}),
]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize(("technique", "params"), CASES, ids=str)
def test_shards_hold_what_one_file_holds_with_and_without_workers(
    technique: str, params: dict, dtype: str | None, world: World
) -> None:
    one = world.merge("one", technique, params, shard=None, dtype=dtype)
    reports = [world.merge(f"{count}", technique, params, split=count, dtype=dtype) for count in (0, 1, 3)]
    want = load(world.room / "one" / "m.safetensors")
    found = load(world.room / "0" / "m.safetensors.index.json")
    assert found.keys() == want.keys() and all(np.array_equal(found[name], want[name]) for name in want)
    assert world.files("0") == world.files("1") == world.files("3")
    assert len(world.files("0")) > 4 and not [name for name in world.files("0") if name.startswith(".")]
    assert all(report.merged_norm == one.merged_norm for report in reports)


def test_one_file_of_another_dtype_has_the_same_bytes_by_workers(world: World) -> None:
    for out, count in (("alone", 0), ("split", 2)):
        world.merge(out, "ties", {}, split=count, shard=None, dtype="float16")
    assert world.files("alone") == world.files("split")


@pytest.mark.parametrize("where", ["shards.made", "shards.settled", "shards.published"])
@pytest.mark.parametrize("at", [1, 3])
def test_merge_that_was_stopped_goes_on_and_has_the_same_bytes(
    where: str, at: int, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    technique, params = "ties", {"density": 1.0, "granularity": "model"}
    world.merge("whole", technique, params)
    passed: list[str] = []

    def point(name: str) -> None:
        passed.append(name)
        if passed.count(where) == min(at, 1 if where == "shards.settled" else at):
            raise Stopped

    monkeypatch.setattr(staged, "point", point)
    with pytest.raises(Stopped):
        world.merge("out", technique, params, split=2)
    assert not (world.room / "out" / "m.safetensors.index.json").exists()
    before = passed.count("shards.made")
    monkeypatch.setattr(staged, "point", passed.append)
    world.merge("out", technique, params)
    assert world.files("out") == world.files("whole")
    parts = len([name for name in world.files("whole") if "-of-" in name])
    assert passed.count("shards.made") <= max(2 * parts, before + parts)
    assert where == "shards.made" or passed.count("shards.made") == before


def test_merge_with_other_parameters_begins_anew_and_removes_what_was_left(world: World, monkeypatch) -> None:
    def point(name: str) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(staged, "point", point)
        with pytest.raises(Stopped):
            world.merge("out", "average", {})
    (left,) = (world.room / "out").glob(".m.*.parts")
    (left / "owner").write_text((left / "owner").read_text().rpartition("-")[0] + "-1")
    world.merge("out", "ties", {})
    world.merge("whole", "ties", {})
    assert world.files("out") == world.files("whole")


def test_merge_that_another_process_makes_is_refused_and_a_mistake_leaves_nothing(
    world: World, monkeypatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(staged, "owner_mark", lambda: "someone-1-1")
        patch.setattr(staged, "is_abandoned", lambda mark, age: False)
        patch.setattr(staged, "point", lambda name: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            world.merge("out", "average", {})
        patch.undo()
        patch.setattr(staged, "is_abandoned", lambda mark, age: False)
        with pytest.raises(CheckpointError, match="another process"):
            world.merge("out", "average", {})
    broken = {**load(world.experts[0])}
    broken[NAMES[-1]][-1, -1] = np.inf
    world.experts[0] = save(world.room / "broken.safetensors", broken)
    with pytest.raises(NonFiniteCheckpoint):
        world.merge("other", "average", {})
    assert not list((world.room / "other").iterdir())


def test_numbers_of_a_shard_that_the_dtype_cannot_hold_are_refused(world: World) -> None:
    large = {name: value * 1e6 if value.ndim > 1 else value for name, value in world.models[0].items()}
    path = save(world.room / "large.safetensors", large)
    with pytest.raises(NonFiniteCheckpoint, match="cannot hold"):
        merge(
            "average",
            {},
            path,
            [path],
            world.room / "l" / "m.safetensors",
            split=Split(2, here),
            shard_bytes=SHARD,
            dtype="float16",
        )
    assert not list((world.room / "l").iterdir())
    with Checkpoint.open(path) as held:
        assert held.tensors
