"""The merge service over any schedule of arrivals and crashes, and over two hundred arrivals: same bytes, no growth."""

import contextlib
import gc
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE, CheckpointWriter, sha256_of
from merge_service.errors import ConflictingArrival, UnrelatedCheckpoint
from merge_service.merging import Member, MergeJob
from merge_service.service import Merger, MergeService
from merge_service.timelines import Merged, Strategy
from merge_service.timelines.time import params_for
from tests.merge_service import toys

T = 5
STRATEGY = Strategy("ema", "ema", "ties", {"density": 0.5}, "first_expert")


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and five experts, as directories."""
    room, rng = tmp_path_factory.mktemp("stream"), np.random.default_rng(5)
    base = toys.towers(rng)
    for t in range(T + 1):
        toys.save(room / f"{t}" / WEIGHTS_FILE, base if t == 0 else toys.moved(rng, base, spread=3))
        (room / f"{t}" / CONFIG_FILE).write_text("{}")
    return [room / f"{t}" for t in range(T + 1)]


@pytest.fixture(scope="module")
def golden(stream: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The served models after each arrival without any fault."""
    with MergeService(STRATEGY, stream[0], tmp_path_factory.mktemp("golden")) as service:
        for t in range(1, T + 1):
            service.arrive(t, stream[t])
        return [sha256_of(service.deployed(t) / WEIGHTS_FILE) for t in range(T + 1)]


ACTS = st.tuples(st.sampled_from(["arrive", "again", "other", "crash"]), st.integers(1, T))


@pytest.mark.fault("F21")
@pytest.mark.timeout(200)
def test_any_schedule_of_arrivals_duplicates_conflicts_and_crashes_serves_the_same(
    stream: list[Path], golden: list[str], tmp_path: Path, record_property: Any
) -> None:
    rooms, tried = count(), []

    @settings(
        max_examples=200, derandomize=True, database=None, deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip
    @given(st.lists(ACTS, min_size=3, max_size=14), st.randoms(use_true_random=False))
    def hold(acts: list[tuple[str, int]], random: Any) -> None:
        tried.append(1)
        scratch = tmp_path / f"{next(rooms)}"
        service, arrived = MergeService(STRATEGY, stream[0], scratch), set[int]()
        for act, t in [*acts, *(("arrive", t) for t in range(1, T + 1))]:
            if act == "arrive" or (act == "again" and t in arrived):
                service.arrive(t, stream[t])
                arrived.add(t)
            elif act == "other" and t in arrived:
                with pytest.raises(ConflictingArrival):
                    service.arrive(t, stream[t % T + 1])
            elif (
                act == "crash"
            ):  # nobody closes anything; who comes next tells it all arrivals again, in any order
                service, order = MergeService(STRATEGY, stream[0], scratch), sorted(arrived)
                random.shuffle(order)
                for again in order:
                    service.arrive(again, stream[again])
            reached = next(t for t in count() if t + 1 not in arrived)
            assert [sha256_of(service.deployed(t) / WEIGHTS_FILE) for t in range(reached + 1)] == golden[
                : reached + 1
            ]
        service.close()

    hold()
    record_property("cases", len(tried))


def held() -> tuple[int, int, int]:
    """Open files, threads, and private memory in bytes of this process."""
    gc.collect()
    resident = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert resident is not None
    return sum(1 for _ in Path("/proc/self/fd").iterdir()), threading.active_count(), int(resident[1]) * 1024


@pytest.mark.fault("F20")
def test_two_hundred_arrivals_take_no_more_files_threads_or_memory_than_twenty(
    stream: list[Path], tmp_path: Path, record_property: Any
) -> None:
    strategy = Strategy("base", "all", "ties", {"density": 0.5})
    with MergeService(strategy, stream[0], tmp_path) as service:
        for t in range(1, 21):
            service.arrive(t, stream[(t - 1) % T + 1])
        before = held()
        for t in range(21, 201):
            service.arrive(t, stream[(t - 1) % T + 1])
        after = held()
    assert after[:2] == before[:2]
    assert after[2] - before[2] < 2_000_000, f"{after[2] - before[2]:,} bytes more"
    record_property(
        "growth over arrivals 21 to 200", f"{(after[2] - before[2]) / 1e6:.1f} MB, 0 files, 0 threads"
    )


class Full(OSError):
    """The error of a full file system."""


@pytest.mark.parametrize("place", ["state", "model"])
def test_arrival_whose_merge_fails_is_forgotten_and_completes_when_it_comes_again(
    place: str, stream: list[Path], golden: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MergeService(STRATEGY, stream[0], tmp_path) as service:
        service.arrive(1, stream[1])
        service.arrive(3, stream[3])
        before = service.history(), service.waiting(), sorted(tmp_path.rglob("*"))
        with fails_at(2 if place == "model" else 1, monkeypatch), pytest.raises(Full):
            service.arrive(2, stream[2])
        assert (service.history(), service.waiting(), sorted(tmp_path.rglob("*"))) == before
        with pytest.raises(LookupError, match="task 2 has not arrived"):
            service.deployed(2)
        assert [moment.t for moment in service.arrive(2, stream[2])] == [2, 3]
        served = [sha256_of(service.deployed(t) / WEIGHTS_FILE) for t in range(4)]
    assert served == golden[:4]


@contextlib.contextmanager
def fails_at(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """From the `number`-th merge on, files cannot be renamed."""
    made = count(1)
    publish = CheckpointWriter.publish

    def broken(writer: CheckpointWriter) -> None:
        if next(made) >= number:
            raise Full(28, "No space left on device")
        publish(writer)

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "publish", broken)
        yield


@pytest.mark.parametrize("number", [1, 2, 3])
def test_replacement_that_fails_leaves_what_was_served(
    number: int, stream: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MergeService(STRATEGY, stream[0], tmp_path) as service:
        for t in range(1, 5):
            service.arrive(t, stream[t])
        before = service.history(), {t: sha256_of(service.deployed(t)) for t in range(5)}
        with fails_at(number, monkeypatch), pytest.raises(Full):
            service.replace(2, stream[5])
        assert (service.history(), {t: sha256_of(service.deployed(t)) for t in range(5)}) == before
        assert [moment.t for moment in service.replace(2, stream[5])] == [2, 3, 4]
        assert sha256_of(service.deployed(4)) != before[1][4]


def test_service_refuses_an_expert_of_another_base_unless_it_is_meant(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = [
        toys.save(tmp_path / f"{i}.safetensors", {"w": rng.normal(size=(16, 16)).astype(np.float32)})
        for i in range(2)
    ]
    strategy = Strategy("base", "all", "average")
    with MergeService(strategy, paths[0], tmp_path / "scratch") as service:
        with pytest.raises(UnrelatedCheckpoint, match=r"^t1 \("):
            service.arrive(1, paths[1])
        assert service.history() == () and service.waiting() == ()
    with MergeService(strategy, paths[0], tmp_path / "scratch", any_base=True) as service:
        assert [moment.t for moment in service.arrive(1, paths[1])] == [1]


@pytest.mark.parametrize("deploy", ["all", "ema"])
@pytest.mark.parametrize("technique", ["average", "dare_ties", "slerp"])
def test_service_writes_the_files_of_a_study_to_the_byte(
    technique: str, deploy: str, stream: list[Path], tmp_path: Path
) -> None:
    if (technique, deploy) == ("slerp", "all"):
        pytest.skip("merges exactly two")
    strategy = Strategy("base", deploy, technique)
    base, merger = Member("base", stream[0], sha256_of(stream[0])), Merger()
    members = [Member(f"t{t}", stream[t], sha256_of(stream[t])) for t in range(1, 4)]
    running = base
    with MergeService(strategy, stream[0], tmp_path / "service") as service:
        for t in range(1, 4):
            service.arrive(t, stream[t])
            out, form = tmp_path / f"study-{t}", "merge" if deploy == "all" else "fold"
            inputs = (
                members[:t] if deploy == "all" else [replace(running, id=f"running-{t - 1}"), members[t - 1]]
            )
            params = params_for(strategy, Merged(deploy, t))  # type: ignore[arg-type]
            job = MergeJob(
                f"t{t}",
                technique,
                params,
                form,
                base,
                tuple(inputs),
                1,
                str(tmp_path / "s"),
                str(tmp_path / "l"),
            )
            merger.merge(job, out)
            running = Member(f"running-{t}", out, sha256_of(out))
            assert sha256_of(service.deployed(t)) == running.sha256
