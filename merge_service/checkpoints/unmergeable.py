"""Refuses well-formed checkpoints whose tensors are not weights to compute with: quantised models, and adapters.

Merging quantised codes, scales without codes, or the two factors of an update separately gives a model, but a wrong one.

Invariant: integer buffers that only count or index (positions, batches seen) are not codes; they are copied.
"""

import json
import re
from pathlib import Path

import numpy as np

from merge_service.checkpoints.header import TensorInfo
from merge_service.checkpoints.weights import Weights
from merge_service.errors import AdapterCheckpoint, QuantisedCheckpoint

_ADAPTER = re.compile(
    r"(^|[._])(lora_(A|B|a|b|down|up|embedding_A|embedding_B|magnitude_vector)|hada_w[12]_[ab]|lokr_w[12](_[ab])?|ia3_l|"
    r"lora\.(up|down)|b?oft_([rRs]|blocks|diag)|vera_lambda_[bd])([._]|$)"
)
_CODES = re.compile(r"(^|\.)(qweight|qzeros|g_idx|weight_packed|W_q|weight_format)$")
_TABLES = re.compile(r"(^|\.)(SCB|absmax|quant_map|quant_state)(\.|$)")
_SCALES = ("_scale_inv", "_scale", "_scales", "_zero_point", ".scale", ".scales", "_absmax", ".SCB", "_SCB")
_SCAN = 1 << 20


def check_mergeable(checkpoint: Weights, who: str) -> None:
    """Raise `AdapterCheckpoint` or `QuantisedCheckpoint` naming `who`, the tensor that shows it, and what to do."""
    adapter = next((name for name in checkpoint.tensors if _ADAPTER.search(name)), None)
    if adapter is not None or all(
        file.name.startswith("adapter_model") for file in checkpoint.files or [checkpoint.path]
    ):
        raise AdapterCheckpoint(
            f"{who} ({checkpoint.path}) holds an adapter such as LoRA's{f' ({adapter})' if adapter else ''}, not a model: "
            f"the mean of factors is not the mean of updates. Give it on its base, BASE+{checkpoint.path}, or its folder with an "
            "adapter_config.json"
        )
    shown = _codes(checkpoint) or (_configured(checkpoint.path.parent) if checkpoint.files else None)
    if shown is not None:
        raise _quantised(checkpoint, who, shown)


def check_integers(reference: Weights, candidate: Weights, who: str) -> tuple[str, ...]:
    """Notes on integers that differ from the reference's. They are not merged; the output has the base's.

    Raises `QuantisedCheckpoint` for integers that must be codes: bytes or packed words in a matrix, or integers beside a scale.
    """
    notes = []
    for name, info in candidate.tensors.items():
        if info.kind.is_float or info.numel == 1 or name not in reference.tensors:
            continue
        if reference.tensors[name].dtype != info.dtype or not _differ(reference, candidate, name):
            continue
        if _are_codes(info) or _scale_of(candidate, name):
            raise _quantised(candidate, who, f"the integers of {name} differ from those of {reference.path}")
        notes.append(
            f"{who}: the integers of {name} differ from those of {reference.path} and are not merged"
        )
    return tuple(notes)


def _are_codes(info: TensorInfo) -> bool:
    """Whether integers that differ between inputs are codes: matrices of bytes, or of words that hold several (I64 are indices)."""
    least = {"I8": 1, "U8": 1, "I16": 2, "U16": 2, "I32": 2, "U32": 2}.get(info.dtype)
    return least is not None and len(info.shape) > 1 and min(info.shape) >= least


def _codes(checkpoint: Weights) -> str | None:
    """The evidence of quantised weights in names and types; None without any."""
    tensors = checkpoint.tensors
    for name, info in tensors.items():
        if _TABLES.search(name) or (_CODES.search(name) and not info.kind.is_float):
            return f"{name} is a code of GPTQ, AWQ, bitsandbytes or the like"
        packed = not info.kind.is_float and info.dtype != "BOOL" and len(info.shape) > 1
        if info.dtype.startswith("F8_") or packed:
            scale = _scale_of(checkpoint, name)
            if scale is not None:
                return f"{name} is {info.dtype} with its scale {scale}"
    return None


def _scale_of(checkpoint: Weights, name: str) -> str | None:
    stem = name.removesuffix(".weight")
    candidates = [one + suffix for one in dict.fromkeys((name, stem)) for suffix in _SCALES]
    found = (one for one in candidates if one in checkpoint.tensors and one != name)
    return next((one for one in found if checkpoint.tensors[one].kind.is_float), None)


def _configured(directory: Path) -> str | None:
    """The evidence of quantisation in the config.json beside the weights; None without any."""
    found = _json(directory / "config.json").get("quantization_config")
    if not isinstance(found, dict):
        return None
    method = found.get("quant_method") or next((key for key in found if found[key] is True), "unknown")
    return f"the config.json beside it has a quantization_config ({str(method)[:40]})"


def _json(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_bytes()) if path.stat().st_size < 1 << 20 else {}
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _differ(one: Weights, other: Weights, name: str) -> bool:
    size = min(one.tensors[name].numel, other.tensors[name].numel)
    return any(
        not np.array_equal(one.raw(name, at, at + _SCAN), other.raw(name, at, at + _SCAN))
        for at in range(0, size, _SCAN)
    )


def _quantised(checkpoint: Weights, who: str, shown: str) -> QuantisedCheckpoint:
    return QuantisedCheckpoint(
        f"{who} ({checkpoint.path}) is quantised: {shown}. Codes and scales cannot be merged as numbers; dequantise it "
        "first (in transformers: model.dequantize(), then save_pretrained), or take the weights from before quantisation"
    )
