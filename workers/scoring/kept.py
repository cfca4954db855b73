"""What a tower that many models share was found to make of pictures and texts, so that it need not be found again.

Experts of one tower leave the other as the base has it: their classifiers, or the features of their pictures, are those of the base.
Invariant: what is kept is named by the content of the tower and by all else that bears on it, and is used in the process that made it
alone, so that a score does not depend on who scored before. It takes so many bytes at most; what was not used for longest goes first.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch

from merge_service.anatomy import modality
from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from workers.models.weights import open_weights

MOST_BYTES = 256 * 2**20
"""Of all that a process keeps: the features of 131,072 pictures at 512 dimensions."""
_BESIDE = ("logit_scale", "logit_bias")


class Kept:
    """Tensors by name."""

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most, self._held = most, 0
        self._tensors: OrderedDict[Hashable, torch.Tensor] = OrderedDict()

    def get(self, name: Hashable) -> torch.Tensor | None:
        """What was put under a name, if it is still there. Not to be changed."""
        if name not in self._tensors:
            return None
        self._tensors.move_to_end(name)
        return self._tensors[name]

    def put(self, name: Hashable, tensor: torch.Tensor) -> None:
        """Keep a tensor, unless it alone is too large."""
        if tensor.nbytes > self._most:
            return
        self._held -= self._tensors.pop(name).nbytes if name in self._tensors else 0
        self._tensors[name] = tensor
        self._held += tensor.nbytes
        while self._held > self._most:
            self._held -= self._tensors.popitem(last=False)[1].nbytes


KEPT = Kept()
"""Of this process."""


def tower_digests(directory: Path) -> dict[str, str]:
    """The digest of each tower of a weights directory, with that of its configuration; temperature and bias belong to neither."""
    found: dict[str, Any] = {}
    described = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    with open_weights(directory / WEIGHTS_FILE) as checkpoint:
        for name in sorted(checkpoint.tensors):
            if name not in _BESIDE:
                tower = found.setdefault(modality(name), hashlib.sha256())
                tower.update(f"{name} {checkpoint.tensors[name].shape} ".encode())
                tower.update(checkpoint.read(name).tobytes())
    text = json.dumps(described, sort_keys=True).encode()
    return {
        tower: f"{digest.hexdigest()} {hashlib.sha256(text).hexdigest()}" for tower, digest in found.items()
    }
