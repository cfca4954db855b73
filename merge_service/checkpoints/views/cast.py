"""A writer that stores floats in another dtype than the merge computes them in.

A merge that is to be written in a given dtype computes in float32 (float64 if the base is), whatever the base is stored in, and
each number is rounded once, here.

Invariant: integers are stored as they are.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from merge_service.checkpoints.dtypes import DTYPES, decode, encode, stored_finite
from merge_service.checkpoints.header import TensorInfo
from merge_service.checkpoints.writer import CheckpointWriter, Writer
from merge_service.errors import CheckpointError, NonFiniteCheckpoint

WRITTEN = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The dtypes that a model can be written in: torch's name, and that of safetensors."""


def written(name: str) -> str:
    """The safetensors name of a dtype that a user wrote. Raises `CheckpointError` naming the ones there are."""
    word = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}.get(name, name)
    found = WRITTEN.get(word.removeprefix("torch."))
    if found is None:
        raise CheckpointError(f"the dtype {name!r} cannot be written; give one of {', '.join(WRITTEN)}")
    return found


def cast(info: TensorInfo, dtype: str | None) -> str:
    """The dtype in which a tensor is written if floats are to be `dtype`."""
    return dtype if dtype is not None and info.kind.is_float else info.dtype


class Cast:
    """`Writer` in front of another: `tensors` are as the merge computes them, floats are written as `dtype`."""

    def __init__(self, writer: Writer, tensors: Mapping[str, TensorInfo], dtype: str) -> None:
        self._writer, self._tensors, self.dtype = writer, tensors, dtype

    @property
    def files(self) -> Sequence[CheckpointWriter]:
        """The writers of the files."""
        return self._writer.files

    def write_stored(self, name: str, start: int, stored: np.ndarray) -> None:
        """As of `Writer`. Raises `NonFiniteCheckpoint` for a number that the dtype cannot hold."""
        info = self._tensors[name]
        if cast(info, self.dtype) != info.dtype:
            kind = DTYPES[self.dtype]
            with np.errstate(over="ignore"):
                stored = encode(decode(stored, info.kind), kind)
            if not stored_finite(stored, kind):
                raise NonFiniteCheckpoint(
                    f"{name} has values that {self.dtype} cannot hold; write a wider dtype, bfloat16 or float32"
                )
        self._writer.write_stored(name, start, stored)
