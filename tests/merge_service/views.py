"""Weights that are not files: arrays in memory, and a view with another model's neurons in another order."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from merge_service.checkpoints import DTYPES, Named, Weights
from merge_service.checkpoints.dtypes import decode
from merge_service.checkpoints.header import TensorInfo
from tests.merge_service.toys import DTYPE


class _View(Named):
    """The common part of weights that are not files."""

    files: list[Path] = []

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return decode(self.raw(name, start, stop), self.tensors[name].kind)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        raise NotImplementedError

    def fingerprint(self) -> str:
        parts = [(name, hashlib.sha256(self.raw(name).tobytes()).hexdigest()) for name in self.tensors]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def digests(self) -> tuple[str, str]:
        return self.fingerprint(), self.fingerprint()


class Arrays(_View):
    """A model in memory. `laid`: whether the compiled loops get the address of its numbers."""

    def __init__(self, arrays: Mapping[str, np.ndarray], name: str = "memory", laid: bool = True) -> None:
        self._laid = laid
        self._arrays = [np.ascontiguousarray(array).reshape(-1) for array in arrays.values()]
        found = {
            key: TensorInfo(DTYPE[array.dtype], array.shape, 0, place)
            for place, (key, array) in enumerate(arrays.items())
        }
        super().__init__(Path(name), found, {"format": "pt"})

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        info = self.tensors[name]
        return self._arrays[info.shard].view(DTYPES[info.dtype].storage)[start:stop]

    def address(self, name: str) -> int | None:
        return self._arrays[self.tensors[name].shard].ctypes.data if self._laid else None


class Permuted(_View):
    """`of` with the rows of some tensors in another order; `orders` are by tensor."""

    def __init__(self, of: Weights, orders: Mapping[str, np.ndarray]) -> None:
        super().__init__(of.path, of.tensors, of.metadata)
        self._of, self._orders = of, orders

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        if name not in self._orders:
            return self._of.raw(name, start, stop)
        rows = self._of.raw(name).reshape(len(self._orders[name]), -1)
        return rows[self._orders[name]].reshape(-1)[start:stop]

    def address(self, name: str) -> int | None:
        return None if name in self._orders else self._of.address(name)
