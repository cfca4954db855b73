"""A merge reads each input once and writes one output: its digest, norms and cosine come out of the pass that merges."""

import hashlib
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from merge_service.checkpoints import sha256_of
from merge_service.engine import assembly
from merge_service.engine.assembly import Execution
from merge_service.merging.combine import combine, combine_weights
from merge_service.merging.derivation import Derivation, Member, Operator, Out, Rules, Way
from merge_service.merging.geometry import geometry
from merge_service.merging.stream import StreamCache
from tests.merge_service.toys import Files, moved, save, towers
from tests.merge_service.views import Arrays

NEWEST = Way(Execution(newest=True), Rules(any_base=True))  # what relates them is sampled before
IN_TURN = [
    ("slerp", {}),
    ("nuslerp", {"space": "task_vectors"}),
    ("karcher", {}),
    ("multislerp", {}),
    ("ties", {"density": 0.5, "granularity": "tensor"}),
    ("breadcrumbs_ties", {"granularity": "tensor"}),
    ("sce", {}),
    ("pcb", {"granularity": "tensor"}),
    ("dare", {"rescale": "l1"}),
]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


class Logged(Arrays):
    """Weights in memory that note which tensors are read, in order."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.log: list[str] = []

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        self.log.append(name)
        return super().raw(name, start, stop)


def derivation(name: str, params: dict, base: Path | None, members: list[Member]) -> Derivation:
    return Derivation(Operator.of(name, params, "merge"), base, tuple(members))


@pytest.mark.parametrize(("name", "params"), [*IN_TURN, ("average", {}), ("task_arithmetic", {})], ids=str)
def test_technique_that_needs_tensors_alone_is_done_with_one_before_it_looks_at_the_next(
    name: str, params: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "TURN", 1)
    rng = np.random.default_rng(3)
    base = towers(rng)
    every = [
        Logged(base, "base", laid=False),
        *(Logged(moved(rng, base), f"e{i}", laid=False) for i in range(2)),
    ]
    members = [Member(f"t{i}", Path(f"e{i}")) for i in (1, 2)]
    combine_weights(
        derivation(name, params, Path("base"), members),
        every[0],
        every[1:],
        Out(tmp_path / "out.safetensors"),
        NEWEST,
    )
    for weights in every:
        blocks = [one for one, _ in groupby(weights.log[weights.log.index("text_projection") :])]
        merged = [one for one in blocks if one not in ("position_ids", "visual.mask")]
        assert len(merged) == len(set(merged)), (weights.path, merged)


@pytest.mark.parametrize(("name", "params"), IN_TURN, ids=str)
def test_bytes_do_not_depend_on_how_many_tensors_come_in_turn(
    name: str, params: dict, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(turn: int) -> str:
        monkeypatch.setattr(assembly, "TURN", turn)
        files.merge(name, params, ids=["a", "b"], threads=2)
        return sha256_of(files.out)

    assert len({made(turn) for turn in (1, 60, 1 << 30)}) == 1


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("average", {}),
        ("average", {"logit_scale": "base"}),
        ("ties", {"density": 0.5}),
        ("slerp", {}),
        ("iso_c", {}),
        ("della", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("stored", ["F32", "BF16"])
def test_norms_and_cosine_of_the_pass_are_those_of_the_files(
    name: str, params: dict, stored: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(5)
    base = towers(rng, spread=8)
    dtypes = {"visual.transformer.resblocks.0.mlp.weight": stored, "text_projection": stored}
    start = save(tmp_path / "base.safetensors", base, dtypes=dtypes)
    paths = [
        save(tmp_path / f"e{i}.safetensors", moved(rng, base, spread=4), dtypes=dtypes) for i in range(2)
    ]
    out = tmp_path / "out.safetensors"
    report = combine(
        derivation(name, params, start, [Member(path.name, path) for path in paths]),
        Out(out, hashed=True),
        NEWEST,
    )
    assert report.geometry is not None
    assert vars(report.geometry) == pytest.approx(geometry(start, out, paths[1]), rel=1e-12)
    assert report.sha256 == {out.name: sha256_of(out)}


def test_shards_are_hashed_while_they_are_written(files: Files) -> None:
    members = [Member(path.name, path) for path in files.paths]
    report = combine(derivation("average", {}, files.start, members), Out(files.out, 400, hashed=True))
    shards = sorted(files.room.glob("out-*.safetensors"))
    assert len(shards) > 1
    assert report.sha256 == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards}


def members_of(paths: list[Path]) -> list[Member]:
    return [Member(path.name, path, sha256_of(path)) for path in paths]


@pytest.mark.parametrize("name", ["average", "ties"])
def test_states_of_a_process_that_ended_are_gone_on_from_without_their_experts(
    name: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(6)
    base = towers(rng)
    start = save(tmp_path / "base.safetensors", base)
    members = members_of([save(tmp_path / f"e{i}.safetensors", moved(rng, base)) for i in range(3)])
    out, scratch = tmp_path / "out.safetensors", tmp_path / "scratch"
    combine(derivation(name, {}, start, members), Out(out))
    expected = sha256_of(out)
    StreamCache(scratch).merge(derivation(name, {}, start, members[:2]), "base", out)
    for gone in members[:2]:
        gone.path.unlink()
    StreamCache(scratch).merge(derivation(name, {}, start, members), "base", out)
    assert sha256_of(out) == expected


def test_state_that_was_damaged_is_made_again_from_the_experts(files: Files) -> None:
    members, scratch = members_of(files.paths), files.room / "scratch"
    combine(derivation("average", {}, files.start, members), Out(files.out))
    expected = sha256_of(files.out)
    StreamCache(scratch).merge(derivation("average", {}, files.start, members[:1]), "base", files.out)
    (state,) = scratch.rglob("*.safetensors")
    body = bytearray(state.read_bytes())
    body[-1] ^= 1
    state.write_bytes(body)
    StreamCache(scratch).merge(derivation("average", {}, files.start, members), "base", files.out)
    assert sha256_of(files.out) == expected
