"""The merge service over any schedule of arrivals and crashes, and over two hundred arrivals: same bytes, nothing grows."""

import gc
import re
import threading
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from merge_service.checkpoint import CONFIG_FILE, WEIGHTS_FILE, sha256_of
from merge_service.errors import ConflictingArrival
from merge_service.service import MergeService
from merge_service.timeline import Strategy

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
    """What is served after each arrival when nothing goes wrong."""
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
    """Open files, threads, and memory of its own in bytes, of this process."""
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
