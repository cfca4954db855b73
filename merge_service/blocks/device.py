"""Where blocks are while rules work on them: in memory as numpy arrays (`Host`), or on a torch device (`Device`).

On a device the array definitions of `rules.py` run as they are, with torch in the place of numpy.
Every thread of a merge has a stream and pinned buffers of its own. A block is copied to the device as it is stored (half
the bytes for half-precision), widened there, and comes back merged; while one thread's copies are under way the others'
blocks are computed. On the CPU the same code runs without streams, which is how it is tested.

Invariant: single IEEE operations on float32 or float64 give the same bits on every device, and no rule has another kind
(no fused multiply-add, no reduction that is stored), so a merge on a device equals the one without.
"""

import contextlib
import threading
from typing import Any

import numpy as np

from merge_service.blocks.spans import Span
from merge_service.checkpoints.checkpoint import Checkpoint
from merge_service.checkpoints.dtypes import EIGHT_BITS, all_finite
from merge_service.errors import TechniqueError


class Host:
    """Blocks as numpy arrays."""

    xp: Any = np

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """One span's work."""
        return contextlib.nullcontext()

    def read(self, weights: Checkpoint, span: Span, compute: np.dtype, role: str) -> Any:
        """A block of stored numbers, as wide as sums are kept. `role` names a buffer, one per block of a span."""
        return weights.read(span.name, span.start, span.stop).astype(compute, copy=False)

    def put(self, array: np.ndarray) -> Any:
        """An array, such as a streaming state's, where blocks are."""
        return array

    def fetch(self, block: Any) -> np.ndarray:
        """A block in memory, to be used before the span's work ends."""
        return block

    def finite(self, block: Any) -> Any:
        """Whether no number is NaN or infinite; a bool, or something that becomes one when it is asked for."""
        return all_finite(block)


class Device(Host):
    """Blocks on a torch device, for one merge; each thread has its own stream and buffers."""

    def __init__(self, name: str) -> None:
        try:
            import torch

            device = torch.device(name)
            torch.empty(0, device=device)
        except Exception as error:  # torch raises many kinds for a device it does not have
            reason = str(error).splitlines()[0]
            raise TechniqueError(
                f"the device {name} cannot be used: {reason}. Leave it out, or name one that this machine has"
            ) from None
        self.xp = torch
        self.device = device
        self._own = threading.local()

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """One span's work, on this thread's stream."""
        stream = self._stream()
        return self.xp.cuda.stream(stream) if stream else contextlib.nullcontext()

    def read(self, weights: Checkpoint, span: Span, compute: np.dtype, role: str) -> Any:
        """As of `Host`; copied as it is stored, widened on the device."""
        kind = weights.tensors[span.name].kind
        raw = weights.raw(span.name, span.start, span.stop)
        if kind.name in EIGHT_BITS:
            raw = EIGHT_BITS[kind.name][raw]
        block = self._upload(raw.view(np.int16) if kind.name == "BF16" else raw, role)
        if kind.name == "BF16":
            block = block.view(self.xp.bfloat16)
        return block.to(self.xp.float64 if compute.itemsize == 8 else self.xp.float32)

    def put(self, array: np.ndarray) -> Any:
        """As of `Host`; uint32 becomes int64, in which torch can count."""
        wide = array.astype(np.int64) if array.dtype == np.uint32 else array
        return self.xp.from_numpy(np.require(wide, requirements=["C", "W"])).to(self.device)

    def fetch(self, block: Any) -> np.ndarray:
        """As of `Host`, once everything before it on this thread's stream is done."""
        return block.cpu().numpy()

    def finite(self, block: Any) -> Any:
        """As of `Host`, without waiting for the answer."""
        return self.xp.isfinite(block).all()

    def _stream(self) -> Any:
        if self.device.type == "cuda" and not hasattr(self._own, "stream"):
            self._own.stream = self.xp.cuda.Stream(self.device)
        return getattr(self._own, "stream", None)

    def _upload(self, raw: np.ndarray, role: str) -> Any:
        block = self.xp.from_numpy(raw.copy())  # the map is read-only, which torch cannot have
        if self._stream() is None:
            return block
        staged = self._pinned(role, block)
        staged.copy_(block)
        return staged.to(self.device, non_blocking=True)

    def _pinned(self, role: str, like: Any) -> Any:
        buffers = self._own.__dict__.setdefault("buffers", {})
        held = buffers.get((role, like.dtype))
        if held is None or held.numel() < like.numel():
            held = buffers[role, like.dtype] = self.xp.empty_like(like, pin_memory=True)
        return held[: like.numel()]
