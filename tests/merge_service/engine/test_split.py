"""A merge in parts equals the merge in one process: bytes, report and errors, for any number of parts."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merge_service import techniques
from merge_service.blocks.search import GATHER
from merge_service.checkpoints import Checkpoint
from merge_service.engine import Part, Split
from merge_service.engine.split import cut
from merge_service.engine.task import Input, MergeTask
from merge_service.errors import CheckpointError, IncompatibleCheckpoint, NonFiniteCheckpoint, TechniqueError
from merge_service.merge import fold, merge
from tests.merge_service import measured
from tests.merge_service.parts import here
from tests.merge_service.toys import dyadic, load, save, towers

ALIKE = {"tied": json.dumps({"text.head.weight": "token_embedding.weight"})}
STORED = {
    "transformer.resblocks.1.mlp.weight": "BF16",
    "visual.ln_pre.bias": "F16",
    "visual.transformer.resblocks.0.mlp.weight": "BF16",
}


class World:
    """A base and three experts: towers, a group too large to be drawn whole, ties, integers, narrow floats, cancelling votes."""

    def __init__(self, room: Path) -> None:
        rng = np.random.default_rng(5)
        base = towers(rng)
        base["visual.proj"] = dyadic(rng, (GATHER // 64 + 1, 64), 64)
        base["text.head.weight"] = base["token_embedding.weight"]
        self.room, self.out = room, room / "out.safetensors"
        self.base = save(room / "base.safetensors", base, ALIKE, STORED)
        self.experts = [self._expert(rng, base, f"expert-{i}") for i in (1, 2, 3)]

    def _expert(self, rng: np.random.Generator, base: dict[str, np.ndarray], name: str) -> Path:
        weights = {
            key: value + dyadic(rng, value.shape, 2) if value.dtype == np.float32 else value
            for key, value in base.items()
        }
        weights["text.head.weight"] = weights["token_embedding.weight"]
        return save(self.room / f"{name}.safetensors", weights, ALIKE, STORED)

    def merged(self, name: str, params: dict[str, Any], **options: Any) -> tuple[bytes, dict[str, Any]]:
        """The bytes and the report of a merge."""
        experts = self.experts[: techniques.get(name).arity]
        for path in experts:
            measured.of_technique(name, path)
        report = merge(name, params, self.base, experts, self.out, **options)
        return self.out.read_bytes(), dataclasses.asdict(report) | {"seconds": None}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("split"))


CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in measured.GIVEN if not techniques.get(name).ordered),
    ("average", {"schedule": "linear", "logit_scale": "base"}),
    ("average", {"logit_scale": "unclamped"}),
    ("ties", {"density": 0.5, "granularity": "model", "count_frozen": False}),
    ("ties", {"density": 0.9, "granularity": "tensor", "consensus": "max"}),
    ("breadcrumbs_ties", {"density": 0.6, "outliers": 0.1, "consensus": "sum"}),
]


@pytest.mark.parametrize("parts", [1, 2, 3, 50])
@pytest.mark.parametrize(("name", "params"), CASES, ids=str)
def test_merge_in_parts_has_the_bytes_and_the_report_of_the_merge(
    name: str, params: dict[str, Any], parts: int, world: World
) -> None:
    whole = world.merged(name, params)
    assert world.merged(name, params, split=Split(parts, here), threads=2) == whole
    assert not list(world.room.glob(".*.tmp"))


def test_merge_in_parts_of_float64_has_the_bytes_of_the_merge(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"a": (300, 300), "b": (7,), "c": (40, 40)}
    base = {n: rng.normal(size=s) for n, s in shapes.items()}
    models = [base, *({n: v + 0.1 * rng.normal(size=v.shape) for n, v in base.items()} for _ in range(2))]
    files = [save(tmp_path / f"{i}.safetensors", model) for i, model in enumerate(models)]
    outs = [tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"]
    for out, split in zip(outs, (None, Split(2, here))):
        merge("ties", {}, files[0], files[1:], out, split=split)
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_fold_in_parts_has_the_bytes_of_the_fold(world: World) -> None:
    running, new = world.experts[:2]
    outs = [world.room / "fold.safetensors", world.room / "fold-in-parts.safetensors"]
    for out, split in zip(outs, (None, Split(2, here))):
        fold("slerp", {"weight": 0.3}, None, running, new, out, split=split)
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_vote_that_cancels_in_one_part_is_settled_by_the_majority_of_all(tmp_path: Path) -> None:
    """Part 1 alone would elect plus (1 against 0); with part 2 it is minus (1 against 3)."""
    taus = [{"a": [1, 1], "b": [-1, -1, -1]}, {"a": [-1, 1], "b": [-1, -1, -1]}]
    base = {"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)}
    start = save(tmp_path / "base.safetensors", base)
    files = [
        save(tmp_path / f"{i}.safetensors", {n: np.array(v, np.float32) for n, v in tau.items()})
        for i, tau in enumerate(taus)
    ]
    out = tmp_path / "out.safetensors"
    merge("ties", {"density": 1, "granularity": "model"}, start, files, out, split=Split(2, here))
    np.testing.assert_array_equal(load(out)["a"], [-1, 1])


def test_merge_of_no_experts_in_parts_is_the_base(world: World) -> None:
    out = world.room / "none.safetensors"
    merge("ties", {}, world.base, [], out, split=Split(3, here))
    with Checkpoint.open(out) as found, Checkpoint.open(world.base) as base:
        for name in base.tensors:
            np.testing.assert_array_equal(found.raw(name), base.raw(name))


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 99])
def test_parts_are_runs_of_the_output_that_make_up_the_whole_in_even_pieces(parts: int, world: World) -> None:
    with Checkpoint.open(world.experts[0]) as expert:
        task = MergeTask.of(techniques.get("average"), {}, None, [Input("one", 1, expert)])
        found = cut(task, task.merged, parts)
        names = [name for part in found for name in part]
        assert sorted(names) == sorted(name for name, _ in task.merged)
        placed = [expert.tensors[name].offset for name in names]
        assert placed == sorted(placed)
        sizes = [sum(expert.tensors[name].nbytes for name in part) for part in found]
        assert len(found) <= parts and all(sizes)
        largest = max(expert.tensors[name].nbytes for name in names)
        assert max(sizes) <= sum(sizes) / parts + largest


@pytest.mark.parametrize("name", ["ties", "average", "task_arithmetic"])
def test_number_that_is_not_finite_is_told_by_a_part_as_by_the_merge(
    name: str, world: World, tmp_path: Path
) -> None:
    weights = load(world.experts[1])
    weights["visual.proj"][-1, -1] = np.nan
    broken = save(tmp_path / "broken.safetensors", weights, ALIKE, STORED)
    out, told = tmp_path / "out.safetensors", []
    out.write_bytes(b"what was there")
    for split in (None, Split(2, here)):
        with pytest.raises(
            NonFiniteCheckpoint, match=r"broken\.safetensors.*visual\.proj has 1 of"
        ) as caught:
            merge(name, {}, world.base, [world.experts[0], broken], out, split=split)
        told.append(str(caught.value))
        assert out.read_bytes() == b"what was there" and not list(tmp_path.glob(".*.tmp"))
    assert told[0] == told[1]


def test_mistake_is_told_before_anybody_is_hired(world: World, tmp_path: Path) -> None:
    def nobody(parts: Sequence[Part]) -> Any:
        raise AssertionError("hired")

    with pytest.raises(TechniqueError, match="density"):
        merge("ties", {"density": 2}, world.base, world.experts, world.out, split=Split(2, nobody))
    with pytest.raises(CheckpointError, match="does not exist"):
        merge("ties", {}, world.base, [world.room / "nowhere"], world.out, split=Split(2, nobody))
    other = save(tmp_path / "other.safetensors", {"w": np.ones(3, np.float32)})
    with pytest.raises(IncompatibleCheckpoint, match="does not have the tensors"):
        merge("ties", {}, world.base, [other], world.out, split=Split(2, nobody))
    with pytest.raises(TechniqueError, match="cannot be split over workers"):
        merge("opcm", {}, world.base, world.experts, world.out, split=Split(2, nobody))


def test_thresholds_that_parts_found_are_kept_as_those_of_the_merge(world: World, tmp_path: Path) -> None:
    kept = []
    for split in (None, Split(3, here)):
        world.merged("ties", {}, keep_thresholds=tmp_path / str(len(kept)), split=split)
        kept.append({file.name: file.read_bytes() for file in (tmp_path / str(len(kept))).iterdir()})
    assert kept[0] == kept[1] and len(kept[0]) == 3


@pytest.mark.parametrize("change", ["missing", "another"])
def test_file_that_is_missing_or_another_where_a_part_is_made_is_told_with_the_machine(
    change: str, world: World, tmp_path: Path
) -> None:
    expert = tmp_path / "expert.safetensors"
    expert.write_bytes(world.experts[0].read_bytes())

    @contextmanager
    def elsewhere(parts: Sequence[Part]) -> Iterator[Any]:
        expert.unlink()
        if change == "another":
            expert.write_bytes(world.experts[1].read_bytes())
        with here(parts) as call:
            yield call

    what = {"missing": "does not exist", "another": "is another file than"}[change]
    with pytest.raises(CheckpointError, match=rf"on \S+: .*expert.safetensors {what}.*shared storage"):
        merge("average", {}, None, [expert, expert], tmp_path / "out.safetensors", split=Split(2, elsewhere))
    assert not (tmp_path / "out.safetensors").exists()


def test_part_that_leaves_a_block_out_never_gives_a_file(world: World, tmp_path: Path) -> None:
    @contextmanager
    def forgetful(parts: Sequence[Part]) -> Iterator[Any]:
        with here(parts) as call:

            def forgetting(method: str, *arguments: Any) -> list[Any]:
                if method == "write":
                    found, stint = arguments
                    arguments = (found, dataclasses.replace(stint, names=((), *stint.names[1:])))
                return call(method, *arguments)

            yield forgetting

    with pytest.raises(AssertionError, match="not every block"):
        merge("average", {}, None, world.experts, tmp_path / "out.safetensors", split=Split(2, forgetful))
    assert not list(tmp_path.iterdir())
