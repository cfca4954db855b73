"""Loss and gradient norm of each step, read late from the device, so that no step waits for the previous one.

Invariant: numbers are returned in the order of the steps, each once, `Host.lag` steps late. So all ranks detect a failed step at the
same step, and none waits for a rank that has stopped.
"""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch

from workers.feed.device import Host
from workers.training.engines.protocol import Report


class Numbers(NamedTuple):
    """Loss, gradient norm (before clipping) and learning rate of step `step` (0-based)."""

    step: int
    loss: float
    norm: float
    lr: float


class Pending:
    """Numbers that are being copied from the device."""

    def __init__(self, device: Host) -> None:
        self._device = device
        self._room = device.staging((device.lag + 1, 2), torch.float32)
        self._events = [device.event() for _ in self._room]
        self._waiting: deque[tuple[int, float]] = deque()

    def add(self, step: int, report: Report) -> Iterator[Numbers]:
        """Start copying the report of a step; yields the numbers of the step `lag` steps earlier, if there is one."""
        place = step % len(self._room)
        self._device.copy(report.numbers, self._room[place])
        self._events[place].record()
        self._waiting.append((step, report.lr))
        return self._read(self._device.lag)

    def rest(self) -> Iterator[Numbers]:
        """The numbers of all remaining steps; waits for their copies."""
        return self._read(0)

    def _read(self, behind: int) -> Iterator[Numbers]:
        while len(self._waiting) > behind:
            step, lr = self._waiting.popleft()
            place = step % len(self._room)
            self._events[place].synchronize()
            loss, norm = self._room[place].numpy().tolist()
            yield Numbers(step, loss, norm, lr)
