"""Merges of a sequence that grows and loses experts: the bytes of a study's merges, from whichever states are there."""

from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest

from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE, sha256_of
from merge_service.live import is_snapshot, link
from merge_service.service import Folder, MergeService, Origin, Place
from merge_service.timelines import Merged, Strategy, deployed
from tests.merge_service import toys

COUNT = 10
STRATEGIES = [
    Strategy("base", "all", "average"),
    Strategy("base", "all", "ties", {"density": 0.5}),
    Strategy("base", "all", "dare_ties", {"density": 0.5}),
    Strategy("base", "all", "magmax"),
    Strategy("base", "all", "iso_c"),
    Strategy("base", "ema", "average", {"weight": 0.5}),
    Strategy("base", "ema", "slerp", {}, "first_expert"),
    Strategy("all", "ema", "average", {"schedule": "linear", "weight": 0.25}),
]
named = pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: f"{s.init}-{s.deploy}-{s.technique}")


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and ten experts, as directories."""
    room, rng = tmp_path_factory.mktemp("stream"), np.random.default_rng(5)
    base = toys.towers(rng)
    for t in range(COUNT + 1):
        toys.save(room / f"{t}" / WEIGHTS_FILE, base if t == 0 else toys.moved(rng, base, spread=3))
        (room / f"{t}" / CONFIG_FILE).write_text("{}")
    return [room / f"{t}" for t in range(COUNT + 1)]


def folder(strategy: Strategy, stream: list[Path], states: Path) -> Folder:
    paths = {sha256_of(path): path for path in stream[1:]}
    return Folder(Origin(strategy, stream[0], sha256_of(stream[0]), paths.__getitem__), states)


def places(experts: list[Path]) -> list[Place]:
    digests = [sha256_of(path) for path in experts]
    chains = [*accumulate(digests, link, initial="0" * 64)][1:]
    return [Place(*pair) for pair in zip(digests, chains)]


def bytes_of(made: Folder, strategy: Strategy, experts: list[Path], out: Path) -> bytes:
    policy = deployed(strategy, len(experts))
    assert isinstance(policy, Merged)
    made.make(policy, places(experts), out)
    return (out / WEIGHTS_FILE).read_bytes()


@named
def test_sequence_that_grows_has_the_bytes_of_the_merge_service_after_every_expert(
    strategy: Strategy, stream: list[Path], tmp_path: Path
) -> None:
    made = folder(strategy, stream, tmp_path / "states")
    with MergeService(strategy, stream[0], tmp_path / "scratch") as service:
        for t in range(1, COUNT + 1):
            service.arrive(t, stream[t])
            if isinstance(deployed(strategy, t), Merged):
                found = bytes_of(made, strategy, stream[1 : t + 1], tmp_path / f"{t}")
                assert found == (service.deployed(t) / WEIGHTS_FILE).read_bytes(), t


@named
@pytest.mark.parametrize("gone", range(1, COUNT + 1))
def test_removal_at_any_position_gives_the_bytes_of_a_sequence_that_never_had_the_expert(
    strategy: Strategy, gone: int, stream: list[Path], tmp_path: Path
) -> None:
    made = folder(strategy, stream, tmp_path / "states")
    bytes_of(made, strategy, stream[1:], tmp_path / "all")
    stay = [path for path in stream[1:] if path != stream[gone]]
    never = folder(strategy, stream, tmp_path / "never")
    assert bytes_of(made, strategy, stay, tmp_path / "refolded") == bytes_of(
        never, strategy, stay, tmp_path / "fresh"
    )


def test_growing_by_one_reads_no_other_expert_and_keeps_only_snapshots_and_the_newest_state(
    stream: list[Path], tmp_path: Path
) -> None:
    strategy, read = STRATEGIES[1], []
    paths = {sha256_of(path): path for path in stream[1:]}
    origin = Origin(
        strategy, stream[0], sha256_of(stream[0]), lambda digest: read.append(digest) or paths[digest]
    )
    made = Folder(origin, tmp_path / "states")
    for t in range(1, COUNT + 1):
        now = places(stream[1 : t + 1])
        made.make(Merged("all", t), now, tmp_path / f"{t}")
        assert read == [now[-1].sha256]
        read.clear()
        kept = {one.chain for at, one in enumerate(now, 1) if at == t or is_snapshot(at)}
        made.keep_only(frozenset(kept))
        assert {path.name[:32] for path in made.states.glob("*.safetensors")} == {one[:32] for one in kept}
    assert not made.damaged()


@pytest.mark.parametrize("strategy", [STRATEGIES[1], STRATEGIES[5]], ids=["stream", "fold"])
def test_damaged_state_is_named_and_made_again(
    strategy: Strategy, stream: list[Path], tmp_path: Path
) -> None:
    made = folder(strategy, stream, tmp_path / "states")
    expected = bytes_of(folder(strategy, stream, tmp_path / "other"), strategy, stream[1:], tmp_path / "a")
    bytes_of(made, strategy, stream[1:COUNT], tmp_path / "b")
    for state in made.states.glob("*.safetensors"):
        damaged = bytearray(state.read_bytes())
        damaged[-3] ^= 1
        state.unlink()
        state.write_bytes(damaged)
    assert len(made.damaged()) == 5  # t = 1, 2, 4, 8 and the newest
    assert bytes_of(made, strategy, stream[1:], tmp_path / "c") == expected
