"""Weights of which nothing but the header is read: stand-ins for numbers, so that a merge can be planned as it will be carried out.

Invariant: no byte of a tensor is read. Two tensors have equal stand-ins if the file says that they are one, and an output layer has those
of an embedding of its shape, of which a model may hold a copy, unless its configuration says that it does not.
"""

import hashlib
import zlib
from dataclasses import replace

import numpy as np

from merge_service.checkpoints.dtypes import decode
from merge_service.checkpoints.folders.heads import OUTPUT, is_source
from merge_service.checkpoints.folders.kinds import CONFIG, read_json
from merge_service.checkpoints.weights import Named, Weights


class Unread(Named):
    """`of` as `Weights` whose numbers depend on the place of a tensor alone."""

    def __init__(self, of: Weights) -> None:
        super().__init__(of.path, of.tensors, of.metadata)
        self.of, self.files = of, of.files
        apart = (read_json(self.path.parent / CONFIG) or {}).get("tie_word_embeddings") is False
        sources = (
            {}
            if apart
            else {(info.dtype, info.shape): info for name, info in self.tensors.items() if is_source(name)}
        )
        for name, info in self.tensors.items():
            source = sources.get((info.dtype, info.shape)) if OUTPUT.search(name) else None
            if source is not None:
                self.tensors[name] = replace(info, shard=source.shard, offset=source.offset)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """As of `Weights`: numbers that differ from place to place."""
        info = self.tensors[name]
        first, last, _ = slice(start, stop).indices(info.numel)
        seed = zlib.crc32(f"{info.shard}:{info.offset}".encode())
        step, begin = (seed >> 16) | 1, seed & 0xFFFF
        return ((np.arange(first, last) * step + begin) & 0xFFFF).astype(info.kind.storage)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """As of `Weights`."""
        return decode(self.raw(name, start, stop), self.tensors[name].kind)

    def address(self, name: str) -> int | None:
        """None: there is nothing to read."""
        return None

    def fingerprint(self) -> str:
        """A digest of the path and the header."""
        said = [(name, info.dtype, info.shape) for name, info in self.of.tensors.items()]
        return hashlib.sha256(repr((str(self.path), said)).encode()).hexdigest()

    def digests(self) -> tuple[str, str]:
        """The same, in the place of digests of the content."""
        return self.fingerprint(), self.fingerprint()
