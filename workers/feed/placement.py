"""Where a process with a GPU runs: within its share of the card, on the cores that are nearest to it.

Several experts may train on one card (`gpus: 0.25`), and machines with several cards have several memories (NUMA): loaders that read
into the far one copy over the bus between processors as well. Invariant: nothing here bears on a result, and a machine that does not say
what is near is left as it is.
"""

import os
from pathlib import Path
from typing import Any

import torch

SYSTEM = Path("/sys")


def settle(share: float) -> None:
    """Bind this process, and the threads that it starts, to the cores near its GPU; below a whole one, to its share of the memory, so
    that one expert cannot take what others on the card need."""
    if share < 1:
        torch.cuda.set_per_process_memory_fraction(share)
    card: Any = torch.cuda.get_device_properties(0)
    address = f"{card.pci_domain_id:04x}:{card.pci_bus_id:02x}:{card.pci_device_id:02x}.0"
    if cores := near(address, os.sched_getaffinity(0)):
        os.sched_setaffinity(0, cores)


def near(address: str, allowed: set[int]) -> set[int]:
    """Of the `allowed` cores those near the card at a PCI address; none where the system does not say, or says that none is allowed."""
    try:
        text = (SYSTEM / "bus" / "pci" / "devices" / address / "local_cpulist").read_text(encoding="ascii")
        spans = [part.split("-") for part in text.strip().split(",") if part]
        return {core for span in spans for core in range(int(span[0]), int(span[-1]) + 1)} & allowed
    except (OSError, ValueError):
        return set()
