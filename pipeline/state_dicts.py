"""Merging models that are in memory, through temporary files: one arithmetic, whatever a model comes in.

Invariant: a tensor goes to its file and comes back bit for bit, bfloat16 included; what is given is never changed.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from merge_service.checkpoint import Checkpoint, CheckpointWriter
from merge_service.dtypes import DTYPES
from merge_service.errors import CheckpointError
from merge_service.ties import Ties, entry, of_groups

_NUMPY = {kind.storage: name for name, kind in DTYPES.items() if name != "BF16"}
_TORCH = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8",
    "torch.uint16": "U16", "torch.uint32": "U32", "torch.uint64": "U64", "torch.bool": "BOOL",
}  # fmt: skip


def merge_state_dicts(
    technique: str,
    params: Mapping[str, Any],
    base: Mapping[str, Any] | None,
    experts: Sequence[Mapping[str, Any]],
    parity: str | None = None,
) -> dict[str, Any]:
    """The merged state dict, with the names, kind, dtypes and devices of the base (of the first expert without one).

    Names that share memory there share it in the result.
    Needs room for all of them among the temporary files. Raises UserError as a merge of files does, and CheckpointError for
    what is no tensor, or of a dtype that checkpoints do not have.
    """
    from pipeline.api import merge_files

    reference = experts[0] if base is None else base
    with tempfile.TemporaryDirectory(prefix="temporal-merge-") as name:
        room = Path(name)
        paths = [_save(room, f"expert-{number}", one) for number, one in enumerate(experts, 1)]
        start = None if base is None else _save(room, "base", base)
        ties = _shared_in_all(reference, experts)
        if ties:
            _save(room, "base" if start else "expert-1", reference, ties)
        merge_files(technique, params, start, paths, room / "merged.safetensors", parity=parity)
        with Checkpoint.open(room / "merged.safetensors") as merged:
            own = {key: _like(value, merged.raw(key)) for key, value in reference.items() if key not in ties}
            return {key: own[ties.get(key, key)] for key in reference}


def _save(room: Path, name: str, tensors: Mapping[str, Any], ties: Ties | None = None) -> Path:
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"{name} is a {type(tensors).__name__}, not a state dict: tensors by name")
    path = room / f"{name}.safetensors"
    layout = {key: (_dtype(value, key, name), tuple(value.shape)) for key, value in tensors.items()}
    with CheckpointWriter(path, layout, {"format": "pt", **entry(ties or {})}) as writer:
        for key, value in tensors.items():
            writer.write_stored(key, 0, _stored(value))
    return path


def _shared_in_all(reference: Mapping[str, Any], experts: Sequence[Mapping[str, Any]]) -> Ties:
    """The names that share one tensor's memory in the reference and hold the same numbers in every expert."""
    groups: dict[Any, list[str]] = {}
    for key, value in reference.items():
        if _is_torch(value) and value.numel() > 0:
            groups.setdefault((value.data_ptr(), value.dtype, value.shape, value.stride()), []).append(key)
        elif isinstance(value, np.ndarray) and value.size > 0:
            place = value.__array_interface__["data"][0]
            groups.setdefault((place, value.dtype, value.shape, value.strides), []).append(key)
    return {
        alias: name
        for alias, name in of_groups(groups.values()).items()
        if all(
            _stored(one[alias]).tobytes() == _stored(one[name]).tobytes()
            for one in experts
            if alias in one and name in one
        )
    }


def _dtype(value: Any, key: str, owner: str) -> str:
    found = _NUMPY.get(value.dtype) if isinstance(value, np.ndarray | np.generic) else None
    if _is_torch(value):
        found = _TORCH.get(str(value.dtype))
    if found is None:
        what = getattr(value, "dtype", type(value).__name__)
        raise CheckpointError(
            f"{owner}: {key!r} is {what}; a state dict holds torch tensors or numpy arrays of the types {', '.join(DTYPES)}"
        )
    return found


def _is_torch(value: Any) -> bool:
    return any(kind.__module__ == "torch" and kind.__name__ == "Tensor" for kind in type(value).__mro__)


def _stored(value: Any) -> np.ndarray:
    """All elements in a row, as they lie in a file."""
    if isinstance(value, np.ndarray | np.generic):  # arithmetic turns arrays without axes into the latter
        return np.ascontiguousarray(value).reshape(-1)
    flat = value.detach().cpu().contiguous().reshape(-1)
    if str(flat.dtype) != "torch.bfloat16":
        return np.asarray(flat.numpy())
    import torch

    return np.asarray(flat.view(torch.int16).numpy().view(np.uint16))


def _like(reference: Any, stored: np.ndarray) -> Any:
    """Elements of a file as what the reference is, in memory of their own."""
    own = stored.copy().reshape(tuple(reference.shape))
    if isinstance(reference, np.ndarray | np.generic):
        return own
    import torch

    if reference.dtype == torch.bfloat16:
        return torch.from_numpy(own.view(np.int16)).view(torch.bfloat16).to(reference.device)
    return torch.from_numpy(own).to(reference.device)
