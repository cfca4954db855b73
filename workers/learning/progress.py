"""The checkpoint of a learning: values and optimizer state after a number of steps, as one safetensors file.

Invariant: learning that goes on from a checkpoint gives the bits of learning that was never interrupted; a checkpoint of anything else
is refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from merge_service.checkpoints import Checkpoint, CheckpointWriter
from merge_service.errors import UserError

_STORED = {torch.float32: "F32", torch.float64: "F64"}
Groups = Mapping[str, dict[str, torch.Tensor]]
"""Tensors by group (values, first, second, ...) and name."""


class Progress:
    """The checkpoint at `path`, None to keep none; `identity` is of everything that bears on the result except the number of steps."""

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path, self.identity = path, identity

    def save(self, groups: Groups, counts: Mapping[str, int], losses: list[float]) -> None:
        """Write it, whole or not at all."""
        if self.path is None:
            return
        flat = {f"{group}/{name}": one for group, held in groups.items() for name, one in held.items()}
        said = {"identity": self.identity, "counts": json.dumps(dict(counts)), "losses": json.dumps(losses)}
        layout = {name: (_STORED[one.dtype], tuple(one.shape)) for name, one in flat.items()}
        with CheckpointWriter(self.path, layout, said) as writer:
            for name, one in flat.items():
                writer.write(name, 0, one.detach().cpu().contiguous().reshape(-1).numpy())

    def restore(self, groups: Groups, counts: dict[str, int]) -> list[float]:
        """Put what is kept into tensors and counts, in place; returns the losses so far, none where there is no checkpoint.

        Raises UserError for a checkpoint of other weights, data or parameters.
        """
        if self.path is None or not self.path.is_file():
            return []
        with Checkpoint.open(self.path) as held:
            if held.metadata.get("identity") != self.identity:
                raise UserError(
                    f"{self.path} is the checkpoint of another learning: other experts, base, data, parameters, threads or kind of device; "
                    "remove it, or give another --out"
                )
            for group, tensors in groups.items():
                for name, one in tensors.items():
                    kept = torch.from_numpy(held.read(f"{group}/{name}").copy())
                    with torch.no_grad():
                        one.copy_(kept.view(one.shape))
            counts.update(json.loads(held.metadata["counts"]))
            return [float(one) for one in json.loads(held.metadata["losses"])]

    def remove(self) -> None:
        """Learning is complete."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
