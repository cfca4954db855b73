"""The merge service: arrivals in any order, repeated, or wrong; and the cache of streaming states below it."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE, sha256_of
from merge_service.errors import (
    ConflictingArrival,
    IncompatibleCheckpoint,
    NonFiniteCheckpoint,
    TechniqueError,
)
from merge_service.merge import fold, merge
from merge_service.merging import Member
from merge_service.merging.derivation import Derivation, Operator
from merge_service.merging.stream import StreamCache
from merge_service.service import MergeService
from merge_service.timelines import Strategy
from tests.merge_service import toys


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and four experts, as directories."""
    room, rng = tmp_path_factory.mktemp("stream"), np.random.default_rng(2)
    base = toys.towers(rng)
    for t in range(5):
        toys.save(room / f"{t}" / WEIGHTS_FILE, base if t == 0 else toys.moved(rng, base, spread=3))
        (room / f"{t}" / CONFIG_FILE).write_text("{}")
    return [room / f"{t}" for t in range(5)]


STRATEGIES = [
    Strategy("base", "all", "ties", {"density": 0.5}),
    Strategy("base", "ema", "dare_ties", {"density": 0.5}, "first_expert"),
    Strategy("all", "ema", "average", {"schedule": "linear", "weight": 0.25}),
    Strategy("ema", "latest", "slerp"),
]


def served(strategy: Strategy, stream: list[Path], order: tuple[int, ...], scratch: Path) -> list[bytes]:
    with MergeService(strategy, stream[0], scratch) as service:
        for t in order:
            service.arrive(t, stream[t])
        assert [moment.t for moment in service.history()] == [1, 2, 3, 4] and not service.waiting()
        paths = [service.deployed(t) for t in range(5)] + [service.initial(t) for t in range(1, 6)]
        return [(path / WEIGHTS_FILE).read_bytes() for path in paths]


@pytest.mark.fault("F20")
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: f"{s.init}-{s.deploy}-{s.technique}")
def test_every_order_of_arrival_serves_the_same_bytes(
    strategy: Strategy,
    stream: list[Path],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    orders = list(itertools.permutations((1, 2, 3, 4)))
    record_property("cases", len(orders))
    expected = served(strategy, stream, orders[0], tmp_path)
    for order in orders[1:]:
        assert served(strategy, stream, order, tmp_path) == expected, order
    assert not list(tmp_path.iterdir())


def test_service_serves_what_merge_and_fold_make(stream: list[Path], tmp_path: Path) -> None:
    with MergeService(STRATEGIES[2], stream[0], tmp_path / "scratch") as service:
        for t in range(1, 5):
            service.arrive(t, stream[t])
        ids = ["t1", "t2", "t3", "t4"]
        shas = {name: sha256_of(path) for name, path in zip(ids, stream[1:])}
        merge(
            "average", {"schedule": "linear"}, stream[0], stream[1:], tmp_path / "all", ids=ids, sha256=shas
        )
        assert (service.initial(5) / WEIGHTS_FILE).read_bytes() == (
            tmp_path / "all" / WEIGHTS_FILE
        ).read_bytes()
        running = stream[0]
        for t in range(1, 5):
            fold("average", {"weight": 0.25}, stream[0], running, stream[t], tmp_path / f"r{t}")
            running = tmp_path / f"r{t}"
        for tensor, value in toys.load(service.deployed()).items():
            np.testing.assert_array_equal(value, toys.load(running)[tensor])


@pytest.mark.fault("F20")
def test_early_experts_wait_and_weights_before_their_time_are_refused(
    stream: list[Path], tmp_path: Path
) -> None:
    with MergeService(STRATEGIES[0], stream[0], tmp_path) as service:
        assert service.deployed() == stream[0] == service.initial(1)
        assert service.arrive(3, stream[3]) == [] and [a.t for a in service.waiting()] == [3]
        with pytest.raises(LookupError, match="expert of task 1 has not arrived"):
            service.deployed(3)
        assert [m.t for m in service.arrive(1, stream[1])] == [1]
        assert [m.t for m in service.arrive(2, stream[2])] == [2, 3]
        report = service.history()[2].merges[0][1]
        assert report.experts == 3 and report.out == service.deployed(3)


@pytest.mark.fault("F19")
def test_the_same_expert_again_does_nothing_and_another_is_a_conflict(
    stream: list[Path], tmp_path: Path
) -> None:
    with MergeService(STRATEGIES[0], stream[0], tmp_path) as service:
        service.arrive(1, stream[1], expert_id="animals")
        before = service.history()
        assert service.arrive(1, stream[1], expert_id="animals") == [] and service.history() == before
        for t, path, name in ((1, stream[2], "animals"), (2, stream[2], "animals"), (1, stream[1], "other")):
            with pytest.raises(ConflictingArrival) as caught:
                service.arrive(t, path, expert_id=name)
            assert sha256_of(path) in str(caught.value) and sha256_of(stream[1]) in str(caught.value)
        assert service.history() == before


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: f"{s.init}-{s.deploy}-{s.technique}")
def test_after_a_replacement_the_service_serves_what_one_does_that_never_saw_the_old_expert(
    strategy: Strategy, stream: list[Path], tmp_path: Path
) -> None:
    mended = tmp_path / "mended"
    shutil.copytree(stream[0], mended)
    expected = served(strategy, [*stream[:2], mended, *stream[3:]], (1, 2, 3, 4), tmp_path / "fresh")
    with MergeService(strategy, stream[0], tmp_path / "scratch") as service:
        for t in (1, 2, 3, 4):
            service.arrive(t, stream[t])
        first = service.history()[0]
        assert [moment.t for moment in service.replace(2, mended)] == [2, 3, 4]
        assert service.history()[0] is first
        paths = [service.deployed(t) for t in range(5)] + [service.initial(t) for t in range(1, 6)]
        assert [(path / WEIGHTS_FILE).read_bytes() for path in paths] == expected


def test_a_removed_expert_leaves_a_gap_that_later_ones_wait_for(stream: list[Path], tmp_path: Path) -> None:
    with MergeService(STRATEGIES[0], stream[0], tmp_path) as service:
        for t in (1, 2, 3):
            service.arrive(t, stream[t])
        before = (service.deployed(3) / WEIGHTS_FILE).read_bytes()
        gone = service.deployed(3)
        service.remove(2)
        assert [a.t for a in service.waiting()] == [3] and len(service.history()) == 1 and not gone.exists()
        with pytest.raises(LookupError, match="task 2 has not arrived"):
            service.deployed(3)
        with pytest.raises(LookupError, match="none to remove"):
            service.remove(2)
        with pytest.raises(LookupError, match="none to replace"):
            service.replace(2, stream[2])
        assert [moment.t for moment in service.arrive(2, stream[2])] == [2, 3]
        assert (service.deployed(3) / WEIGHTS_FILE).read_bytes() == before
        with pytest.raises(ConflictingArrival, match="t3 is already the expert of task 3"):
            service.replace(2, stream[4], expert_id="t3")
        assert (service.deployed(3) / WEIGHTS_FILE).read_bytes() == before


@pytest.mark.fault("F17", "F18")
def test_a_bad_expert_is_refused_on_arrival_and_may_come_again_mended(
    stream: list[Path], tmp_path: Path
) -> None:
    model = toys.load(stream[1])
    poisoned = toys.save(
        tmp_path / "nan.safetensors", model | {"visual.ln_pre.bias": np.full(5, np.nan, np.float32)}
    )
    other = toys.save(tmp_path / "shape.safetensors", model | {"visual.ln_pre.bias": np.zeros(4, np.float32)})
    with MergeService(STRATEGIES[0], stream[0], tmp_path / "scratch") as service:
        with pytest.raises(NonFiniteCheckpoint, match=r"photos \(t=1\).*visual.ln_pre.bias has 5 of 5"):
            service.arrive(1, poisoned, expert_id="photos")
        with pytest.raises(IncompatibleCheckpoint, match=r"photos \(t=1\)"):
            service.arrive(1, other, expert_id="photos")
        assert service.history() == ()
        service.arrive(1, stream[1], expert_id="photos")
        assert len(service.history()) == 1


def test_a_strategy_that_cannot_run_gives_no_service(stream: list[Path], tmp_path: Path) -> None:
    with pytest.raises(TechniqueError):
        MergeService(Strategy("base", "all", "slerp"), stream[0], tmp_path)


@pytest.mark.parametrize("technique", ["average", "ties", "lines_dare_ties", "magmax"])
def test_cached_states_change_no_byte_whatever_was_asked_before(
    technique: str, stream: list[Path], tmp_path: Path
) -> None:
    shas = [sha256_of(path) for path in stream]
    members = [Member(f"t{t}", stream[t], shas[t]) for t in range(1, 5)]

    def direct(chosen: list[Member]) -> bytes:
        out = tmp_path / "direct.safetensors"
        merge(technique, {}, stream[0], [m.path for m in chosen], out, ids=[m.id for m in chosen],
              sha256={m.id: m.sha256 for m in chosen})  # fmt: skip
        return out.read_bytes()

    cache = StreamCache(tmp_path / "scratch")
    for asked in ([0], [0, 1], [0, 1, 2, 3], [0, 1], [0, 1], [3, 2], [3, 2, 0], [2, 2][:1], []):
        chosen = [members[i] for i in asked]
        derivation = Derivation(Operator.of(technique, {}, "merge"), stream[0], tuple(chosen))
        cache.merge(derivation, shas[0], tmp_path / "cached.safetensors")
        assert (tmp_path / "cached.safetensors").read_bytes() == direct(chosen), asked
    assert len(list((tmp_path / "scratch").rglob("*.safetensors"))) == 1
    cache.close()
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("technique", ["average", "ties", "opcm"])
def test_state_that_leaves_too_little_room_is_not_kept_and_changes_no_byte(
    technique: str, stream: list[Path], tmp_path: Path
) -> None:
    shas = [sha256_of(path / WEIGHTS_FILE) for path in stream]
    members = [Member(f"t{t}", path, sha) for t, (path, sha) in enumerate(zip(stream[1:4], shas[1:4]), 1)]
    roomy, full = StreamCache(tmp_path / "roomy"), StreamCache(tmp_path / "full")
    operator, disk = Operator.of(technique, {}, "merge"), shutil.disk_usage(tmp_path).total
    for count, reserve in ((1, 0), (2, disk), (3, disk)):
        derivation = Derivation(operator, stream[0], tuple(members[:count]))
        for cache, left in ((roomy, 0), (full, reserve)):
            cache.merge(derivation, shas[0], tmp_path / "out.safetensors", reserve=left)
            (tmp_path / "out.safetensors").rename(tmp_path / f"{left > 0}.safetensors")
        made = [(tmp_path / f"{one}.safetensors").read_bytes() for one in {False, reserve > 0}]
        assert made[0] == made[-1]
        assert len([*(tmp_path / "full").rglob("*.safetensors")]) == (reserve == 0)


def test_an_arrival_reads_only_the_newest_expert(stream: list[Path], tmp_path: Path) -> None:
    copies = [Path(shutil.copytree(path, tmp_path / path.name)) for path in stream]
    with MergeService(STRATEGIES[0], copies[0], tmp_path / "scratch") as service:
        for t in range(1, 4):
            service.arrive(t, copies[t])
            shutil.rmtree(copies[t])
        assert len(service.history()) == 3
