"""Weights seen through new names: a part of the tensors, layers in another order, each multiplied by a factor, or widened.

A recipe that takes layers 0 to 8 of one model and 4 to 12 of another sees each of them through such a view. A tensor may appear
under several names.

Invariant: a view copies nothing but what it returns, and two names of equal `offset` are one tensor with one factor.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from merge_service.checkpoints.dtypes import encode
from merge_service.checkpoints.header import TensorInfo
from merge_service.checkpoints.ties import KEY, entry, recorded
from merge_service.checkpoints.weights import Named, Weights


class View(Named):
    """`of` as `Weights` with other names: `names` maps each name here to the name there.

    `factors` multiply tensors, by name here. With `wide`, floats of less than 32 bits are float32, which is exact.
    """

    def __init__(
        self,
        of: Weights,
        names: Mapping[str, str],
        factors: Mapping[str, float] | None = None,
        wide: bool = False,
    ) -> None:
        self.of, self.files, self.is_widened = of, of.files, False
        self._at: list[tuple[str, float]] = []
        places: dict[tuple[int, int, bool, float], int] = {}
        tensors: dict[str, TensorInfo] = {}
        for name, there in names.items():
            info, factor = of.tensors[there], (factors or {}).get(name, 1.0)
            key = (info.shard, info.offset, info.numel > 0, factor)
            if key not in places or not info.numel:
                places[key] = len(self._at)
                self._at.append((there, factor))
            narrow = wide and info.kind.is_float and info.kind.itemsize < 4
            tensors[name] = replace(info, dtype="F32" if narrow else info.dtype, shard=0, offset=places[key])
        super().__init__(of.path, tensors, _metadata(of, names))

    @classmethod
    def widened(cls, of: Weights) -> "View":
        """All tensors, floats of less than 32 bits as float32."""
        made = cls(of, {name: name for name in of.tensors}, wide=True)
        made.is_widened = True
        return made

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """As of `Weights`."""
        there, factor = self._at[self.tensors[name].offset]
        values = self.of.read(there, start, stop)
        return values if factor == 1 else values * values.dtype.type(factor)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """As of `Weights`; a tensor that is changed by the view is made in its dtype here."""
        there, _ = self._at[self.tensors[name].offset]
        if self._is_plain(name):
            return self.of.raw(there, start, stop)
        return encode(self.read(name, start, stop), self.tensors[name].kind)

    def address(self, name: str) -> int | None:
        """As of `Weights`."""
        there, _ = self._at[self.tensors[name].offset]
        return self.of.address(there) if self._is_plain(name) else None

    def fingerprint(self) -> str:
        """That of the weights behind it."""
        return self.of.fingerprint()

    def digests(self) -> tuple[str, str]:
        """Those of the weights behind it."""
        return self.of.digests()

    def _is_plain(self, name: str) -> bool:
        info = self.tensors[name]
        there, factor = self._at[info.offset]
        return factor == 1 and self.of.tensors[there].dtype == info.dtype


def _metadata(of: Weights, names: Mapping[str, str]) -> dict[str, str]:
    """The metadata, with recorded ties under the names here; a tie of which one side is missing is left out."""
    here: dict[str, list[str]] = {}
    for name, there in names.items():
        here.setdefault(there, []).append(name)
    ties = {
        here[alias][0]: here[name][0]
        for alias, name in recorded(of).items()
        if len(here.get(alias, ())) == len(here.get(name, ())) == 1
    }
    rest = {key: value for key, value in of.metadata.items() if key != KEY}
    return rest | entry(ties)
