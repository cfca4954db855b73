"""The state of an engine as it was at a step, to be written while the steps after it run.

Invariant: a snapshot is what the stream that computes left behind when it was taken; its buffers are used again by the next one, so a
snapshot is written before another is taken.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from merge_service.checkpoints import CheckpointWriter
from workers.feed.device import Host

_DTYPES = {
    torch.float32: "F32",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Snapshot:
    """Takes hold of tensors, and writes them to a safetensors file."""

    def __init__(self, device: Host) -> None:
        self._device, self._taken = device, device.event()
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, tensors: Mapping[str, torch.Tensor], file: Path) -> Callable[[], None]:
        """Copy `tensors` to main memory without waiting; always the same names and shapes. What is returned waits for the copies and
        writes them. On a CPU they are written here, without a copy."""
        if not self._device.overlaps:
            _write(tensors, file)
            return lambda: None
        for name, tensor in tensors.items():
            if name not in self._buffers:
                self._buffers[name] = self._device.staging(tensor.shape, tensor.dtype)
            self._device.copy(tensor.detach(), self._buffers[name])
        self._taken.record()

        def write() -> None:
            self._taken.synchronize()
            _write(self._buffers, file)

        return write


def _write(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    layout = {name: (_DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    with CheckpointWriter(file, layout) as writer:
        for name, tensor in tensors.items():
            writer.write_stored(name, 0, tensor.detach().reshape(-1).numpy())
