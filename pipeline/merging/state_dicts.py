"""Merging models in memory, through temporary files, so that all forms of a model use the same arithmetic.

Invariant: a tensor is written to its file and read back bit for bit, bfloat16 included; the inputs are never changed.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from merge_service.checkpoints import DTYPES, Checkpoint, CheckpointWriter, Ties, entry, of_groups
from merge_service.errors import CheckpointError
from pipeline.merging.files import FileMerge, merge_files

_NUMPY = {kind.storage: name for name, kind in DTYPES.items() if name != "BF16" and not name.startswith("F8")}
_TORCH = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2", "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8",
    "torch.uint16": "U16", "torch.uint32": "U32", "torch.uint64": "U64", "torch.bool": "BOOL",
}  # fmt: skip


_BITS = {
    "torch.bfloat16": ("int16", np.uint16),
    "torch.float8_e4m3fn": ("uint8", np.uint8),
    "torch.float8_e5m2": ("uint8", np.uint8),
}
"""Formats that numpy lacks: the integer types for their bits, in torch and in a file."""


def merge_state_dicts(
    technique: str,
    params: Mapping[str, Any],
    base: Mapping[str, Any] | None,
    experts: Sequence[Mapping[str, Any]],
    **options: Any,
) -> dict[str, Any]:
    """The merged state dict, with the names, kind, dtypes and devices of the base (of the first expert without one).

    `options` are those of `pipeline.api.merge`. Names that share memory in the base share it in the result. Needs space for all
    models among the temporary files. Raises UserError as a merge of files does, and CheckpointError for a value that is no
    tensor, or has a dtype that checkpoints lack.
    """
    reference = experts[0] if base is None else base
    with tempfile.TemporaryDirectory(prefix="temporal-merge-") as name:
        room = Path(name)
        paths = [_saved(room, f"expert-{number}", one) for number, one in enumerate(experts, 1)]
        start = None if base is None else _saved(room, "base", base)
        shared = _shared_in_all(reference, experts)
        if shared:
            _saved(room, "base" if start else "expert-1", reference, shared)
        merge_files(FileMerge(technique, params, start, paths, room / "merged.safetensors", **options))
        prefix = options.get("strip_prefix") or ""
        with Checkpoint.open(room / "merged.safetensors") as merged:
            own = {
                key: _like(value, merged.raw(key.removeprefix(prefix)))
                for key, value in reference.items()
                if key not in shared
            }
        return {key.removeprefix(prefix): own[shared.get(key, key)] for key in reference}


def save(path: Path, tensors: Mapping[str, Any], ties: Ties | None = None) -> Path:
    """Write a state dict as safetensors, names that share memory with their ties recorded (or these `ties`).

    Raises CheckpointError for what is no state dict, or a value that is no tensor with numbers.
    """
    name = path.name.removesuffix(".safetensors")
    if not isinstance(tensors, Mapping):
        hint = "; give its state_dict()" if hasattr(tensors, "state_dict") else ""
        raise CheckpointError(
            f"{name} is a {type(tensors).__name__}, not a state dict: tensors by name{hint}"
        )
    layout = {key: (_dtype(value, key, name), tuple(value.shape)) for key, value in tensors.items()}
    shared = _shared_in_all(tensors, ()) if ties is None else ties
    with CheckpointWriter(path, layout, {"format": "pt", **entry(shared)}) as writer:
        for key, value in tensors.items():
            writer.write_stored(key, 0, _stored(value))
    return path


def _saved(room: Path, name: str, tensors: Mapping[str, Any], ties: Ties | None = None) -> Path:
    return save(room / f"{name}.safetensors", tensors, ties or {})


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
    if not isinstance(key, str):
        raise CheckpointError(
            f"{owner}: {key!r} is no name of a tensor; the keys of a state dict are strings"
        )
    unusual = _unusual(value)
    if unusual is not None:
        raise CheckpointError(f"{owner}: {key!r} is {unusual}")
    found = _NUMPY.get(value.dtype) if isinstance(value, np.ndarray | np.generic) else None
    if _is_torch(value):
        found = _TORCH.get(str(value.dtype))
    if found is None:
        what = getattr(value, "dtype", type(value).__name__)
        raise CheckpointError(
            f"{owner}: {key!r} is {what}; a state dict holds torch tensors or numpy arrays of the types {', '.join(DTYPES)}"
        )
    return found


def _unusual(value: Any) -> str | None:
    """What a value without numbers to merge is, and what to do; None for a plain tensor or an unknown value."""
    if isinstance(value, Mapping):
        return "a dict itself: give the state dict that lies in it (for instance checkpoint['state_dict'])"
    if not _is_torch(value):
        return None
    if value.is_meta:
        return "on the meta device, which holds no numbers; load the weights first"
    if value.is_quantized:
        return "quantised; give its dequantize()"
    if str(value.layout) != "torch.strided":
        return f"sparse ({value.layout}); give its to_dense()"
    return None


def _is_torch(value: Any) -> bool:
    return any(kind.__module__ == "torch" and kind.__name__ == "Tensor" for kind in type(value).__mro__)


def _stored(value: Any) -> np.ndarray:
    """All elements in a row, as stored in a file."""
    if isinstance(value, np.ndarray | np.generic):  # arithmetic turns arrays without axes into the latter
        return np.ascontiguousarray(value).reshape(-1)
    flat = value.detach().cpu().contiguous().reshape(-1)
    if str(flat.dtype) not in _BITS:
        return np.asarray(flat.numpy())
    import torch

    as_bits, storage = _BITS[str(flat.dtype)]
    return np.asarray(flat.view(getattr(torch, as_bits)).numpy().view(storage))


def _like(reference: Any, stored: np.ndarray) -> Any:
    """Elements of a file in the form of the reference, in their own memory."""
    own = stored.copy().reshape(tuple(reference.shape))
    if isinstance(reference, np.ndarray | np.generic):
        return own
    import torch

    if str(reference.dtype) in _BITS:
        as_bits, _ = _BITS[str(reference.dtype)]
        return torch.from_numpy(own.view(as_bits)).view(reference.dtype).to(reference.device)
    return torch.from_numpy(own).to(reference.device)
