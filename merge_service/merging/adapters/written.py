"""Writes an adapter in the form of PEFT: `adapter_model.safetensors` beside `adapter_config.json`.

The scale of every module is 1: alpha is the rank. Ranks that differ between modules are entries of the patterns.

Invariant: the weights appear last, so a folder with weights is complete.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from merge_service.checkpoints.adapters.updates import Form
from merge_service.checkpoints.folders.kinds import ADAPTER, ADAPTER_CONFIG
from merge_service.checkpoints.writer import CheckpointWriter
from merge_service.errors import CheckpointError
from merge_service.files import replace_whole

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Factors:
    """What is added to one tensor of the base, `left` [rows, r] @ `right` [r, columns], float32; `shape` is the tensor's."""

    name: str
    shape: tuple[int, ...]
    left: np.ndarray
    right: np.ndarray
    form: Form = "linear"

    @property
    def module(self) -> str:
        """The module whose weight it is, by its path."""
        return self.name.removesuffix(".weight").removesuffix(".in_proj_weight")

    @property
    def rank(self) -> int:
        """Columns of `left`."""
        return int(self.left.shape[1])


@dataclass(frozen=True)
class Written:
    """An adapter that was written. `residual` is |tau - B A| / |tau| over the whole model, 0 if it is exact; `left_out` is the part of it
    in tensors that an adapter does not hold, the first of which are `without`.
    """

    out: Path
    modules: int
    rank: int
    bytes: int
    residual: float = 0.0
    left_out: float = 0.0
    without: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def write(out: Path, base: Path | str, parts: Iterable[Factors]) -> tuple[int, int, int]:
    """Write the parts as an adapter of `base`, a path or a name; returns how many modules it has, their largest rank, and the bytes of its weights."""
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    every = list(parts)
    packed = {one.module for one in every if one.name.endswith("in_proj_weight")}
    transposed = any(one.form == "transposed" for one in every)
    unclear = next(
        (one.name for one in every if transposed and one.form == "linear" and _is_unclear(one, packed)), None
    )
    if unclear is not None:
        raise CheckpointError(
            f"{unclear} is square and stored [out, in], others are stored [in, out]; in the one file of an adapter the two could not be "
            "told apart, so write the whole model (--out)"
        )
    for one in every:
        ranks[one.module] = one.rank
        tensors |= _stored(one, packed)
    rank = max(ranks.values())
    others = {module: found for module, found in ranks.items() if found != rank}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(module for module in ranks if _outer(module, packed) is None),
        "fan_in_fan_out": transposed,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    out.mkdir(parents=True, exist_ok=True)
    weights = out / f"{ADAPTER}.safetensors"
    layout = {name: ("F32", value.shape) for name, value in tensors.items()}
    with CheckpointWriter(weights, layout, {"format": "pt"}) as writer:
        for name, value in tensors.items():
            writer.write(name, 0, np.ascontiguousarray(value, np.float32).reshape(-1))
        weights.unlink(
            missing_ok=True
        )  # those of an earlier adapter, which the new configuration does not describe
        replace_whole(out / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
    return len(ranks), rank, weights.stat().st_size


def _is_unclear(one: Factors, packed: set[str]) -> bool:
    return len(one.shape) == 2 and one.shape[0] == one.shape[1] and _outer(one.module, packed) is None


def _stored(one: Factors, packed: set[str]) -> dict[str, np.ndarray]:
    left, right = one.left, one.right
    outer = _outer(one.module, packed)
    module = one.module if outer is None else f"{outer}.base_layer.out_proj"
    if one.form == "embedding":
        return {f"{_PREFIX}{module}.lora_embedding_A": left.T, f"{_PREFIX}{module}.lora_embedding_B": right.T}
    down, up = (left.T, right.T) if one.form == "transposed" else (right, left)
    if len(one.shape) > 2:
        down = down.reshape(one.rank, *one.shape[1:])
        up = up.reshape(one.shape[0], one.rank, *[1] * (len(one.shape) - 2))
    return {f"{_PREFIX}{module}.lora_A.weight": down, f"{_PREFIX}{module}.lora_B.weight": up}


def _outer(module: str, packed: set[str]) -> str | None:
    """The attention whose output projection this is, if its q, k and v are adapted as one tensor: peft then wraps both together."""
    outer, _, last = module.rpartition(".")
    return outer if last == "out_proj" and outer in packed else None
