"""Machine usage during training: sampled, bounded, and without effect on the training."""

import threading

import pytest

from workers.training import usage
from workers.training.usage import POINTS, Usage


def test_short_training_has_one_sample_with_the_names_that_mlflow_draws() -> None:
    with Usage() as seen:
        pass
    names = {"cpu_utilization_percentage", "system_memory_usage_megabytes", "system_memory_usage_percentage"}
    assert names | {"time_ms", "process_memory_usage_megabytes"} == seen.samples.keys()
    assert {len(values) for values in seen.samples.values()} == {1}
    assert all(0 <= seen.samples[name][0] <= 100 for name in names if name.endswith("percentage"))


def test_long_training_keeps_a_bounded_number_of_samples_over_all_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter(range(0, 10**12, 10**6))
    monkeypatch.setattr(usage.time, "time_ns", lambda: next(times))
    seen = Usage()
    for _ in range(5 * POINTS):
        seen._sample()
    stamps = seen.samples["time_ms"]
    assert (
        POINTS // 2 <= len(stamps) <= POINTS and len({len(values) for values in seen.samples.values()}) == 1
    )
    assert stamps == sorted(stamps) and stamps[-1] >= 5 * POINTS - 16


def test_counter_that_comes_and_goes_leaves_a_value_for_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Usage()
    for gpu in ({}, {"gpu_0_utilization_percentage": 5.0}, {}):
        monkeypatch.setattr(seen, "_gpu", lambda gpu=gpu: gpu)
        seen._sample()
    assert {len(values) for values in seen.samples.values()} == {2}


def test_counter_that_a_machine_lacks_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise NotImplementedError

    monkeypatch.setattr(usage.psutil, "virtual_memory", broken)
    with Usage() as seen:
        pass
    assert seen.samples == {} and "usage" not in {thread.name for thread in threading.enumerate()}
