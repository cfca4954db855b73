"""Merging models in memory by the arithmetic of files, without files.

Invariant: the result has the bits of a merge of files, bfloat16 included, and the ties of the base; the inputs are never changed.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from merge_service.checkpoints import DTYPES, Checkpoint, CheckpointWriter, InMemory, Ties, entry, of_groups
from merge_service.errors import CheckpointError
from pipeline.merging.files import FileMerge, merge_files, settled

if TYPE_CHECKING:
    from merge_service.checkpoints import Layout
    from merge_service.merging import Operator

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

    `options` are those of `pipeline.api.merge`. Names that share memory in the base share it in the result. Tensors of the host are read
    in place, those of a device one at a time. A technique that takes experts one after another keeps its state and its inputs in
    temporary files. Raises UserError as a merge of files does, and CheckpointError for a value that is no tensor, or has a dtype
    that checkpoints lack.
    """
    from merge_service.merging import Operator
    from merge_service.timelines import translate_merge

    reference = experts[0] if base is None else base
    models = {f"expert-{number}": one for number, one in enumerate(experts, 1)}
    if base is not None:
        models["base"] = base
    layouts = {name: _layout(name, one) for name, one in models.items()}
    what = settled(FileMerge(technique, params, None, [], Path("merged.safetensors"), **options))
    resolved = translate_merge(technique, what.params, what.parity, len(experts))
    operator = Operator.of(technique, resolved, "merge")
    shared = _shared_in_all(reference, experts)
    ties = {"expert-1" if base is None else "base": shared}
    if operator.technique.ordered:
        found = _through_files(what, models, ties)
    else:
        opened = {name: _opened(name, one, layouts[name], ties.get(name, {})) for name, one in models.items()}
        found = _merged(operator, opened, what)
    prefix = what.strip_prefix or ""
    own = {
        key: _like(value, found[key.removeprefix(prefix)])
        for key, value in reference.items()
        if key not in shared
    }
    return {key.removeprefix(prefix): own[shared.get(key, key)] for key in reference}


def _merged(operator: "Operator", opened: Mapping[str, InMemory], what: FileMerge) -> dict[str, np.ndarray]:
    from merge_service.engine import Execution
    from merge_service.merging import Rules, Way, merge_in_memory

    way = Way(Execution(len(os.sched_getaffinity(0)), measure=False), Rules(what.any_base, what.strip_prefix))
    experts = [one for name, one in opened.items() if name != "base"]
    return merge_in_memory(
        operator, opened.get("base"), experts, way, ids=what.ids, statistics=what.statistics
    )


def _through_files(
    what: FileMerge, models: Mapping[str, Mapping[str, Any]], ties: Mapping[str, Ties]
) -> dict[str, np.ndarray]:
    """The same by way of temporary files, for techniques whose merge is a stream of experts with a state."""
    with tempfile.TemporaryDirectory(prefix="temporal-merge-") as place:
        room = Path(place)
        paths = {
            name: save(room / f"{name}.safetensors", one, ties.get(name, {})) for name, one in models.items()
        }
        experts, out = [path for name, path in paths.items() if name != "base"], room / "merged.safetensors"
        merge_files(replace(what, base=paths.get("base"), experts=experts, out=out))
        with Checkpoint.open(out) as merged:
            return {name: merged.raw(name).copy() for name in merged.tensors}


def _opened(name: str, tensors: Mapping[str, Any], layout: "Layout", ties: Ties) -> InMemory:
    """A state dict as weights. Tensors that lie in a row on the host are read where they are."""
    elements = {
        key: _stored(value) if _lies_in_a_row(value) else partial(_stored, value)
        for key, value in tensors.items()
    }
    return InMemory(Path(name), layout, elements, {"format": "pt", **entry(ties)})


def _lies_in_a_row(value: Any) -> bool:
    if _is_torch(value):
        return bool(value.device.type == "cpu" and value.is_contiguous())
    return isinstance(value, np.generic) or bool(value.flags.c_contiguous and value.flags.aligned)


def save(path: Path, tensors: Mapping[str, Any], ties: Ties | None = None) -> Path:
    """Write a state dict as safetensors, names that share memory with their ties recorded (or these `ties`).

    Raises CheckpointError for what is no state dict, or a value that is no tensor with numbers.
    """
    layout = _layout(path.name.removesuffix(".safetensors"), tensors)
    shared = _shared_in_all(tensors, ()) if ties is None else ties
    with CheckpointWriter(path, layout, {"format": "pt", **entry(shared)}) as writer:
        for key, value in tensors.items():
            writer.write_stored(key, 0, _stored(value))
    return path


def _layout(name: str, tensors: Mapping[str, Any]) -> "Layout":
    """Dtype and shape by name. Raises CheckpointError for what is no state dict, or a value that is no tensor with numbers."""
    if not isinstance(tensors, Mapping):
        hint = "; give its state_dict()" if hasattr(tensors, "state_dict") else ""
        raise CheckpointError(
            f"{name} is a {type(tensors).__name__}, not a state dict: tensors by name{hint}"
        )
    return {key: (_dtype(value, key, name), tuple(value.shape)) for key, value in tensors.items()}


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
    """Elements as stored, which become the result's own memory, in the form of the reference."""
    own = stored.reshape(tuple(reference.shape))
    if isinstance(reference, np.ndarray | np.generic):
        return own
    import torch

    if str(reference.dtype) in _BITS:
        as_bits, _ = _BITS[str(reference.dtype)]
        return torch.from_numpy(own.view(as_bits)).view(reference.dtype).to(reference.device)
    return torch.from_numpy(own).to(reference.device)
