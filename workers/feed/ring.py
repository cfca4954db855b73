"""Batches on their way to a device: read into a ring of buffers and copied while the steps before them run.

On a GPU two threads bring batches, so that one is planned while another is read, `loaders` threads read pictures, and a stream of its
own copies them; on a CPU a batch is read when it is asked for, since a thread beside training would only take its cores.
Invariant: a buffer is written only when the copy out of it is done, memory on the device only when the step that used it is done,
and a step begins after its copies: batches are the same bytes on every device, with any number of loaders.
"""

import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch

from workers.data.share import Share, copy_rows
from workers.feed.device import Host
from workers.feed.pixels import Pixels

if TYPE_CHECKING:
    from workers.data.decode import Samples


PARTS = 4
"""Parts of a batch for every loader, so that none waits long for the last one."""


class Batch(NamedTuple):
    """A batch on the device: `images` float32 [b, 3, H, W]; `tokens` int64 [u, context], the distinct ones; `places` int64 [b],
    the row of `tokens` that belongs to each image. Without texts the last two are empty.

    The memory of tokens and places is used again once the next batch is asked for.
    """

    images: torch.Tensor
    tokens: torch.Tensor
    places: torch.Tensor


class Shares(Protocol):
    """Where batches come from: `workers.data.batches.Batches`, or some pictures `InOrder`."""

    shape: tuple[int, int, int, int]
    """Of the largest batch: pictures, height, width, 3."""

    def share(self, step: int) -> Share:
        """What the batch of a step holds."""

    def read(self, share: Share, start: int, stop: int, out: np.ndarray) -> None:
        """Copy pictures start..stop of a share, uint8, into the rows of `out`. From several threads at a time."""


class InOrder:
    """Pictures `rows` of a split as they are, one after the other; `batch_size` at a time, the last batch may be smaller."""

    def __init__(self, samples: "Samples", rows: np.ndarray, batch_size: int) -> None:
        self._images, self._rows, self._size = samples.images, rows, min(batch_size, max(1, len(rows)))
        height, width = samples.images.shape[1:3]
        self.shape = (self._size, int(height), int(width), 3)
        self.steps = range(-(-len(rows) // self._size))
        """Of `feed`, for all rows."""

    def share(self, step: int) -> Share:
        """Batch number `step`."""
        rows = self._rows[step * self._size : (step + 1) * self._size]
        none = np.empty((0, 0), np.int64)
        return Share(none, rows, np.empty((0, 4), np.float32), none, none)

    def read(self, share: Share, start: int, stop: int, out: np.ndarray) -> None:
        """As of `Shares`."""
        rows = share.rows[start:stop]
        if len(rows) and rows[-1] - rows[0] + 1 == len(
            rows
        ):  # consecutive: a view of the memory map, copied at once
            out[...] = self._images[rows[0] : rows[-1] + 1]
        else:
            copy_rows(self._images, rows, out)


def feed(
    shares: Shares, pixels: Pixels, device: Host, steps: range, loaders: int = 1
) -> Generator[tuple[int, Batch], None, None]:
    """(step, batch) of the steps in order. To be closed when it is left early; raises what `shares` raises."""
    copying = threading.Lock()
    ring = [_Slot(shares, device, copying) for _ in range(device.slots)]
    with device.helpers(2) as lead, ThreadPoolExecutor(loaders) as hands:
        threads = hands if loaders > 1 else None
        coming = deque(
            (slot, lead.submit(slot.fill, step, threads, loaders))
            for slot, step in zip(ring, steps, strict=False)
        )
        try:
            for step in steps:
                slot, filled = coming.popleft()
                filled.result()
                yield step, slot.batch(pixels)
                slot.used.record()
                if step + len(ring) in steps:
                    coming.append((slot, lead.submit(slot.fill, step + len(ring), threads, loaders)))
        finally:
            lead.shutdown(cancel_futures=True)
            for slot in ring:
                slot.rest()


def ready(shares: Shares, pixels: Pixels, step: int) -> Batch:
    """The batch of a step on the CPU, in memory of its own."""
    slot = _Slot(shares, Host(), threading.Lock())
    slot.fill(step, None, 1)
    return slot.batch(pixels)


class _Slot:
    """The buffers of one batch, and what they are copied to."""

    def __init__(self, shares: Shares, device: Host, copying: threading.Lock) -> None:
        self._shares, self._device, self._copying = shares, device, copying
        self._copied, self.used = device.event(), device.event()
        self._pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._there: dict[str, torch.Tensor] = {}

    def fill(self, step: int, hands: ThreadPoolExecutor | None, loaders: int) -> None:
        """Read the batch of a step and have it copied; returns before the copy is done."""
        self._copied.synchronize()
        share = self._shares.share(step)
        count = len(share.rows)
        images = self._pair("images", self._shares.shape, torch.uint8)[0].numpy()[:count]

        def read(start: int, stop: int) -> None:
            self._shares.read(share, start, stop, images[start:stop])

        if hands is None:
            read(0, count)
        else:
            parts = PARTS * loaders
            edges = [count * number // parts for number in range(parts + 1)]
            list(hands.map(read, edges, edges[1:]))
        arrays = {"boxes": share.boxes, "tokens": share.tokens, "places": share.places}
        sizes = {"images": count}
        for name, array in arrays.items():
            shape = (self._shares.shape[0], *array.shape[1:])
            self._pair(name, shape, torch.from_numpy(array).dtype)[0].numpy()[: len(array)] = array
            sizes[name] = len(array)
        with self._copying, self._device.beside():
            self.used.wait()
            for name, size in sizes.items():
                source, target = self._pairs[name]
                if target is not source:
                    self._device.copy(source[:size], target[:size])
                self._there[name] = target[:size]
            self._copied.record()

    def rest(self) -> None:
        """Wait until nothing is copied any more, so that the memory may be given back."""
        self._copied.synchronize()

    def batch(self, pixels: Pixels) -> Batch:
        """What was filled in, ready for the stream that computes."""
        self._copied.wait()
        boxes = self._there["boxes"]
        images = pixels(self._there["images"], boxes if len(boxes) else None)
        return Batch(images, self._there["tokens"], self._there["places"])

    def _pair(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if name not in self._pairs:
            staging = self._device.staging(shape, dtype)
            self._pairs[name] = (staging, self._device.mirror(staging))
        return self._pairs[name]
