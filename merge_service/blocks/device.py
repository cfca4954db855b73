"""Block storage: numpy arrays on the host (`Host`), or tensors on a torch device (`Device`).

On a device the array definitions of the rules run with torch in place of numpy. Every thread of a merge has its own stream and a
few pinned buffers, whatever the number of experts. A block is read into a pinned buffer as stored (half the bytes for half
precision), widened on the device, merged and copied back, while blocks of other threads are computed. On the CPU the same code runs
without streams, which is how it is tested.

Invariant: a merge on a device gives the bits of a merge on the host. Rules use single IEEE operations on float32 or float64,
which give the same bits on every device; they use no fused multiply-add, and no reduction is stored.
"""

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from merge_service.blocks.spans import BLOCK, Span
from merge_service.checkpoints.dtypes import EIGHT_BITS, all_finite
from merge_service.checkpoints.weights import Weights
from merge_service.errors import TechniqueError

DEVICE_BLOCK = 1 << 23
"""Default elements per span on a device: 32 MiB of float32, enough that a copy reaches the speed of the bus."""
STAGES = 3
"""Pinned buffers per thread: one is filled while the copies of the others run."""


class Host:
    """Blocks as numpy arrays. `block` is the default number of elements per span, `full` what is raised where a block does not fit."""

    xp: Any = np
    block: int = BLOCK
    full: tuple[type[BaseException], ...] = ()

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """The context of one span's work."""
        return contextlib.nullcontext()

    def read(self, weights: Weights, span: Span, compute: np.dtype) -> Any:
        """A block of stored numbers, in the type of sums."""
        return weights.read(span.name, span.start, span.stop).astype(compute, copy=False)

    def put(self, array: np.ndarray) -> Any:
        """Move an array, such as a streaming state's, to this storage."""
        return array

    def fetch(self, block: Any) -> np.ndarray:
        """Copy a block to memory; it is valid until the span's work ends."""
        return block

    def finite(self, block: Any) -> Any:
        """Whether all numbers are finite, for `settled`."""
        return all_finite(block)

    def settled(self, flags: Sequence[Any]) -> list[bool]:
        """The values of flags, waited for once."""
        return [bool(flag) for flag in flags]

    def clear(self) -> None:
        """Free memory that is held for later blocks."""


class Device(Host):
    """Blocks on a torch device, for one merge; each thread has its own stream and buffers."""

    def __init__(self, name: str) -> None:
        try:
            import torch

            device = torch.device(name)
            torch.empty(0, device=device)
        except Exception as error:  # torch raises many kinds for a missing device
            reason = str(error).splitlines()[0]
            raise TechniqueError(
                f"the device {name} cannot be used: {reason}. Leave it out, or name one that this machine has"
            ) from None
        self.xp, self.device = torch, device
        self.block, self.full = DEVICE_BLOCK, (torch.OutOfMemoryError,)
        self._own = threading.local()

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """The context of one span's work, on this thread's stream."""
        stream = self._stream()
        return self.xp.cuda.stream(stream) if stream else contextlib.nullcontext()

    def read(self, weights: Weights, span: Span, compute: np.dtype) -> Any:
        """As of `Host`; the block is copied as stored and widened on the device."""
        kind = weights.tensors[span.name].kind
        raw = weights.raw(span.name, span.start, span.stop)
        if kind.name in EIGHT_BITS:
            raw = EIGHT_BITS[kind.name][raw]
        block = self._upload(raw.view(np.int16) if kind.name == "BF16" else raw)
        if kind.name == "BF16":
            block = block.view(self.xp.bfloat16)
        return block.to(self.xp.float64 if compute.itemsize == 8 else self.xp.float32)

    def put(self, array: np.ndarray) -> Any:
        """As of `Host`; uint32 becomes int64, because torch cannot count in uint32."""
        wide = array.astype(np.int64) if array.dtype == np.uint32 else array
        return self.xp.from_numpy(np.require(wide, requirements=["C", "W"])).to(self.device)

    def fetch(self, block: Any) -> np.ndarray:
        """As of `Host`, after all earlier work on this thread's stream."""
        return block.cpu().numpy()

    def finite(self, block: Any) -> Any:
        """As of `Host`, without synchronization."""
        return self.xp.isfinite(block).all()

    def settled(self, flags: Sequence[Any]) -> list[bool]:
        """As of `Host`, in one copy."""
        return list(self.xp.stack(tuple(flags)).tolist()) if flags else []

    def clear(self) -> None:
        """As of `Host`: the device's cache, after the work of this thread's stream."""
        if self.device.type == "cuda":
            self._stream().synchronize()
            self.xp.cuda.empty_cache()

    def _stream(self) -> Any:
        if self.device.type == "cuda" and not hasattr(self._own, "stream"):
            self._own.stream = self.xp.cuda.Stream(self.device)
        return getattr(self._own, "stream", None)

    def _upload(self, raw: np.ndarray) -> Any:
        if self._stream() is None:
            return self.xp.from_numpy(raw.copy())  # torch takes no read-only memory, and the map is
        stages = self._own.__dict__.setdefault("stages", [_Stage(self.xp) for _ in range(STAGES)])
        stages.append(stages.pop(0))
        return stages[-1].upload(raw, self.device)


class _Stage:
    """A pinned buffer, and the event after which it may be filled again."""

    def __init__(self, torch: Any) -> None:
        self._torch, self._free = torch, torch.cuda.Event()
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def upload(self, raw: np.ndarray, device: Any) -> Any:
        """A copy of `raw` on the device, on the current stream."""
        self._free.synchronize()
        if self._bytes.numel() < raw.nbytes:
            self._bytes = self._torch.empty(raw.nbytes, dtype=self._torch.uint8, pin_memory=True)
        part = self._bytes[: raw.nbytes].numpy().view(raw.dtype)
        np.copyto(part, raw)
        block = self._torch.from_numpy(part).to(device, non_blocking=True)
        self._free.record()
        return block
