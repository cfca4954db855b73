"""Peak memory of a step: it grows with allocations and is reset for the next step."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError

from cluster import memory
from cluster.memory import OutOfMemory, peak_on_gpu, peak_resident, reset_peaks
from cluster.pool import Call, WorkerLost

SIZE = 200 * 2**20


def test_peak_is_that_of_the_step_and_not_of_the_one_before() -> None:
    reset_peaks()
    before = peak_resident()
    held = np.ones(SIZE // 8)
    during = peak_resident()
    assert during - before > 0.9 * SIZE
    del held
    reset_peaks()
    assert peak_resident() < during - 0.9 * SIZE


def test_without_a_gpu_there_is_no_memory_on_it() -> None:
    assert peak_on_gpu() == 0


def lost(error: RayError) -> Exception:
    group: Any = SimpleNamespace()
    return Call(group, [], group)._lost(error)


@pytest.mark.fault("F29")
def test_worker_that_ray_ended_for_its_nodes_memory_says_so_and_which_keys_to_change() -> None:
    said = (
        "Task was killed due to the node running low on memory.\nMemory on the node (IP: 10.0.0.2) was 95%."
    )
    error = lost(OutOfMemoryError(said))
    assert isinstance(error, OutOfMemory) and "10.0.0.2" not in str(error).split("(")[0]
    for key in ("resources.experts.groups", "recipe.batch_size", "resources.experts.memory"):
        assert key in str(error)


@pytest.mark.fault("F29")
def test_worker_gone_while_the_kernel_killed_for_memory_is_out_of_memory_and_otherwise_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = tmp_path / "vmstat"
    counter.write_text("nr_free_pages 1\noom_kill 3\n")
    monkeypatch.setattr(memory, "_KERNEL", counter)
    group: Any = SimpleNamespace()
    call, died = Call(group, [], group), ActorDiedError()
    assert isinstance(call._lost(died), WorkerLost)
    counter.write_text("nr_free_pages 1\noom_kill 4\n")
    assert isinstance(call._lost(died), OutOfMemory) and "kernel" in str(call._lost(died))
    counter.unlink()
    assert isinstance(call._lost(died), WorkerLost)
