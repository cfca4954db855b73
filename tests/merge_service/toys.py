"""Small checkpoints on disk for the merge tests, written and read."""

import json
from pathlib import Path

import numpy as np

from merge_service.checkpoints import Checkpoint, CheckpointWriter
from merge_service.merge import merge
from tests.merge_service import measured

NUMPY = {
    "F32": np.float32,
    "F64": np.float64,
    "F16": np.float16,
    "I64": np.int64,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
DTYPE = {np.dtype(kind): name for name, kind in NUMPY.items()}


def save(
    path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None, dtypes=None
) -> Path:
    """A checkpoint of these arrays, in this order; `dtypes` overrides how some are stored (for instance BF16)."""
    dtypes = dtypes or {}
    layout = {name: (dtypes.get(name, DTYPE[value.dtype]), value.shape) for name, value in tensors.items()}
    with CheckpointWriter(path, layout, metadata or {"format": "pt"}) as writer:
        for name, value in tensors.items():
            writer.write(name, 0, np.ascontiguousarray(value).reshape(-1))
    return path


def load(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint as numbers."""
    with Checkpoint.open(path) as checkpoint:
        return {
            name: checkpoint.read(name).reshape(info.shape).copy()
            for name, info in checkpoint.tensors.items()
        }


def made(path: Path) -> dict:
    """The record of how a merged file was made."""
    with Checkpoint.open(path) as checkpoint:
        return json.loads(checkpoint.metadata["temporal_merge"])


def vector(values, dtype=np.float32) -> np.ndarray:
    return np.array(values, dtype)


def towers(rng: np.random.Generator, *, spread: int = 64) -> dict[str, np.ndarray]:
    """A model with two towers of unequal depth, a scalar, integers, and dyadic values that sums represent exactly."""
    shapes = {
        "logit_scale": (),
        "text_projection": (4, 3),
        "token_embedding.weight": (3, 4),
        "transformer.resblocks.0.mlp.weight": (7,),
        "transformer.resblocks.1.mlp.weight": (2, 5),
        "visual.ln_pre.bias": (5,),
        "visual.transformer.resblocks.0.attn.in_proj_weight": (12, 4),
        "visual.transformer.resblocks.0.mlp.weight": (13,),
        "visual.transformer.resblocks.1.mlp.weight": (9,),
        "visual.transformer.resblocks.2.mlp.weight": (6,),
    }
    model = {
        name: dyadic(rng, shape, 16 if name == "logit_scale" else spread) for name, shape in shapes.items()
    }
    model["position_ids"] = np.arange(6, dtype=np.int64)
    model["visual.mask"] = np.array([True, False, True])
    return model


def moved(
    rng: np.random.Generator, base: dict[str, np.ndarray], *, spread: int = 64, frozen=()
) -> dict[str, np.ndarray]:
    """An expert: the base plus a dyadic task vector, except for some unchanged tensors."""
    return {
        name: value
        if value.dtype != np.float32 or name in frozen
        else value + dyadic(rng, value.shape, spread)
        for name, value in base.items()
    }


def kin(base: dict[str, np.ndarray], model: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A model whose matrices lie near those of the base, as an expert's do; vectors and names are its own."""
    fifth = np.float32(0.2)
    return {
        name: base[name] + fifth * (value - base[name]) if value.ndim > 1 and name in base else value
        for name, value in model.items()
    }


def dyadic(rng: np.random.Generator, shape, spread: int) -> np.ndarray:
    return (rng.integers(-spread, spread + 1, shape) / 16).astype(np.float32)


class Files:
    """A base and two experts."""

    def __init__(self, room: Path) -> None:
        rng = np.random.default_rng(1)
        self.room, self.base = room, towers(rng)
        self.experts = [moved(rng, self.base) for _ in range(2)]
        self.start = save(room / "base.safetensors", self.base)
        self.paths = [save(room / f"e{i}.safetensors", e) for i, e in enumerate(self.experts)]
        self.out = room / "out.safetensors"

    def merge(self, name: str, params=None, **options) -> dict[str, np.ndarray]:
        for path in self.paths:
            measured.of_technique(name, path)
        merge(name, params or {}, self.start, self.paths, self.out, **options)
        return load(self.out)


def way(room: Path, name: str, params: dict, *taus) -> np.ndarray:
    """How far a merge moves the tensor `w`, whose base is zero."""
    taus = [vector(tau) for tau in taus]
    zero = save(room / "b.safetensors", {"w": np.zeros_like(taus[0])})
    paths = [save(room / f"{i}.safetensors", {"w": tau}) for i, tau in enumerate(taus)]
    merge(name, params, zero, paths, room / "o.safetensors")
    return load(room / "o.safetensors")["w"]
