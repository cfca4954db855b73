"""A process with a GPU keeps to its share of the card and to the cores near it."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from workers.actors import Worker
from workers.feed import placement

CARD = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """A machine of 16 cores, of which 2-3 and 10-11 are near the card; what a process asks of it."""
    place = tmp_path / "bus/pci/devices/0000:c1:00.0"
    place.mkdir(parents=True)
    (place / "local_cpulist").write_text("2-3,10-11\n")
    asked: list[tuple[str, object]] = []
    monkeypatch.setattr(placement, "SYSTEM", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 10})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: asked.append(("cores", cores)))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: CARD)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share: asked.append(("memory", share))
    )
    return asked


@pytest.mark.parametrize(("share", "memory"), [(0.25, [("memory", 0.25)]), (1.0, []), (2.0, [])])
def test_worker_of_a_gpu_keeps_to_its_share_and_to_the_cores_near_it(
    machine: list[tuple[str, object]], share: float, memory: list[tuple[str, object]]
) -> None:
    Worker(0, 1, 1, "cuda", share)
    assert machine == [*memory, ("cores", {2, 3, 10})]


def test_worker_of_a_cpu_asks_nothing_of_its_machine(machine: list[tuple[str, object]]) -> None:
    Worker(0, 1, 1, "cpu", 0)
    assert machine == []


@pytest.mark.parametrize("said", [None, "", "none", "40-47"])
def test_machine_that_does_not_say_what_is_near_is_left_as_it_is(
    machine: list[tuple[str, object]], said: str | None
) -> None:
    file = placement.SYSTEM / "bus/pci/devices/0000:c1:00.0/local_cpulist"
    file.unlink() if said is None else file.write_text(said)
    placement.settle(1.0)
    assert machine == []
