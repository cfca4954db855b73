"""Blocks on a torch device: the array definitions of `rules.py` run there as they are, with torch in the place of numpy.

Every thread of a merge has a stream and pinned buffers of its own. A block is copied to the device as it is stored (half
the bytes for half-precision), widened there, and comes back merged; while one thread's copies are under way the others'
blocks are computed. On the CPU the same code runs without streams, which is how it is tested.

Invariant: single IEEE operations on float32 or float64 give the same bits on every device, and no rule has another kind
(no fused multiply-add, no reduction that is stored), so a merge on a device equals the one without.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from merge_service.checkpoint import Checkpoint
from merge_service.engine import Span
from merge_service.errors import TechniqueError


class Device(threading.local):
    """A torch device, for one merge; each thread has its own stream."""

    def __init__(self, name: str) -> None:
        try:
            import torch

            device = torch.device(name)
            torch.empty(0, device=device)
        except Exception as error:  # torch raises many kinds for a device it does not have
            reason = str(error).splitlines()[0]
            raise TechniqueError(
                f"--device {name} cannot be used: {reason}; take cpu, or cuda on a machine that has it"
            ) from None
        self.torch: Any = torch
        self.device = device
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pinned: dict[tuple[str, Any], Any] = {}

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """One block's work on this thread's stream."""
        with self.torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            yield

    def read(self, weights: Checkpoint, span: Span, compute: np.dtype, role: str) -> Any:
        """A block of stored numbers, on the device and as wide as sums are kept. `role` names a staging buffer."""
        kind = weights.tensors[span.name].kind
        raw = weights.raw(span.name, span.start, span.stop)
        if kind.name == "BF16":
            raw = raw.view(np.int16)
        block = self._upload(raw, role)
        if kind.name == "BF16":
            block = block.view(self.torch.bfloat16)
        return block.to(self.torch.float64 if compute.itemsize == 8 else self.torch.float32)

    def put(self, array: np.ndarray) -> Any:
        """An array of numbers (a streaming state, a mask's hashes) on the device; uint32 as int64, which torch can count in."""
        wide = array.astype(np.int64) if array.dtype == np.uint32 else array
        return self.torch.from_numpy(np.ascontiguousarray(wide)).to(self.device)

    def fetch(self, block: Any) -> np.ndarray:
        """A block back in memory, once everything before it on this thread's stream is done."""
        if self.stream is None:
            return block.cpu().numpy()
        home = self._buffer("out", block.numel(), block.dtype)
        home.copy_(block, non_blocking=True)
        self.stream.synchronize()
        return home.numpy()

    def finite(self, block: Any) -> bool:
        """Whether no number of the block is NaN or infinite."""
        return bool(self.torch.isfinite(block).all())

    def _upload(self, raw: np.ndarray, role: str) -> Any:
        if self.stream is None:
            return self.torch.from_numpy(raw.copy())
        staged = self._buffer(role, raw.size, self.torch.from_numpy(raw[:0].copy()).dtype)
        staged.copy_(self.torch.from_numpy(raw.copy()))
        return staged.to(self.device, non_blocking=True)

    def _buffer(self, role: str, size: int, dtype: Any) -> Any:
        held = self._pinned.get((role, dtype))
        if held is None or held.numel() < size:
            held = self._pinned[role, dtype] = self.torch.empty(size, dtype=dtype, pin_memory=True)
        return held[:size]
