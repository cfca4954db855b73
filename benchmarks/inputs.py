"""Checkpoints for the benchmarks: open_clip's tensor names and shapes, and task vectors like those of fine-tuning.

Shapes come from each architecture's widths and depths, values from one random stream per (seed, expert, tensor). So a file
depends neither on the number of threads nor on the number of experts.

Invariant: a file in the directory's manifest is complete; any other file is made again.
"""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 1  # of the values: raise it when they change, and old files are made again
MANIFEST = "manifest.json"
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """The numbers of an open_clip configuration that decide its tensors."""

    embed: int
    image: int
    patch: int
    width: int
    layers: int
    mlp: int
    context: int
    text_width: int
    text_layers: int
    vocabulary: int = 49408

    def shapes(self) -> Shapes:
        """Names and shapes, in the order of open_clip's state dict."""
        text, image = self.text_width, self.width
        tokens = (self.image // self.patch) ** 2 + 1
        return {
            "positional_embedding": (self.context, text),
            "text_projection": (text, self.embed),
            "logit_scale": (),
            "visual.class_embedding": (image,),
            "visual.positional_embedding": (tokens, image),
            "visual.proj": (image, self.embed),
            "visual.conv1.weight": (image, 3, self.patch, self.patch),
            **_norm("visual.ln_pre", image),
            **_blocks("visual.transformer", self.layers, image, self.mlp),
            **_norm("visual.ln_post", image),
            **_blocks("transformer", self.text_layers, text, 4 * text),
            "token_embedding.weight": (self.vocabulary, text),
            **_norm("ln_final", text),
        }


@dataclass(frozen=True)
class ImageTower(Architecture):
    """The image tower alone."""

    def shapes(self) -> Shapes:
        """Names and shapes, as of `Architecture`."""
        return {name: shape for name, shape in super().shapes().items() if name.startswith("visual.")}


@dataclass(frozen=True)
class Few:
    """A few tensors of two towers of two blocks each: what an arrival costs beside arithmetic is seen best."""

    def shapes(self) -> Shapes:
        """Names and shapes, as of `Architecture`."""
        matrices = {
            f"{tower}.resblocks.{layer}.mlp.c_fc.weight": (128, 64)
            for tower in ("visual.transformer", "transformer")
            for layer in (0, 1)
        }
        return {"logit_scale": (), **matrices, "token_embedding.weight": (1024, 64)}


SIZES: dict[str, Architecture | Few] = {
    "micro": Few(),
    "small": Architecture(256, 224, 16, 256, 6, 1024, 77, 256, 6),
    "tiny": Architecture(64, 32, 8, 96, 3, 192, 16, 64, 2),
    "vit-b-32": Architecture(512, 224, 32, 768, 12, 3072, 77, 512, 12),
    "vit-b-16": Architecture(512, 224, 16, 768, 12, 3072, 77, 512, 12),
    "vit-l-14": Architecture(768, 224, 14, 1024, 24, 4096, 77, 768, 12),
    "tiny-image": ImageTower(64, 32, 8, 96, 3, 192, 16, 64, 2),
    "vit-b-16-image": ImageTower(512, 224, 16, 768, 12, 3072, 77, 512, 12),
}


@dataclass(frozen=True)
class Inputs:
    """The files of one measurement; `nbytes` is the size of each."""

    base: Path
    experts: list[Path]
    nbytes: int

    def warm(self, paths: list[Path]) -> None:
        """Read `paths` once, so that the page cache holds them."""
        buffer = bytearray(1 << 22)
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def make_inputs(work: Path, size: str, experts: int, threads: int = 2) -> Inputs:
    """A base and `experts` checkpoints of this size (fp32 safetensors) under `work`; what is there already is kept."""
    place = work / size
    place.mkdir(parents=True, exist_ok=True)
    wanted = {f"expert-{i:03}.safetensors" if i else "base.safetensors": i for i in range(experts + 1)}
    known = _read_manifest(place)
    missing = {name: index for name, index in wanted.items() if not _intact(place / name, known.get(name))}
    if missing:
        print(f"making {len(missing)} checkpoints of {size} in {place}", flush=True)
        _write_files(place, SIZES[size].shapes(), missing, threads)
        known |= {name: _mark(place / name) for name in missing}
        (place / MANIFEST).write_text(json.dumps({"version": VERSION, "files": known}, indent=1))
    paths = [place / name for name in wanted]
    return Inputs(paths[0], paths[1:], paths[0].stat().st_size)


def base_values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights of std 0.02, norms about one, and a logit scale below CLIP's cap of ln(100)."""
    if not shape:
        return np.array(4.5, np.float32)
    values = _stream(0, name).standard_normal(shape, np.float32)
    values *= np.float32(0.02)
    if ".ln_" in f".{name}" and name.endswith("weight"):
        values += np.float32(1)
    return values


def task_vector(name: str, shape: tuple[int, ...], expert: int) -> np.ndarray:
    """Heavy-tailed changes of std about 1e-4, their scale differing by tensor and by row; almost none is zero."""
    random = _stream(expert, name)
    scale = 1e-4 * math.exp(random.normal(0.0, 0.5) - 0.25)
    rows = np.exp(random.normal(0.0, 0.5, shape[:1]) - 0.25) * scale
    values = random.standard_normal(shape, np.float32)
    values *= rows.astype(np.float32).reshape(-1, *[1] * (len(shape) - 1)) if shape else np.float32(scale)
    return values


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _blocks(name: str, layers: int, width: int, mlp: int) -> Shapes:
    shapes: Shapes = {}
    for layer in range(layers):
        block = f"{name}.resblocks.{layer}"
        shapes |= _norm(f"{block}.ln_1", width)
        shapes |= {
            f"{block}.attn.in_proj_weight": (3 * width, width),
            f"{block}.attn.in_proj_bias": (3 * width,),
        }
        shapes |= {f"{block}.attn.out_proj.weight": (width, width), f"{block}.attn.out_proj.bias": (width,)}
        shapes |= _norm(f"{block}.ln_2", width)
        shapes |= {f"{block}.mlp.c_fc.weight": (mlp, width), f"{block}.mlp.c_fc.bias": (mlp,)}
        shapes |= {f"{block}.mlp.c_proj.weight": (width, mlp), f"{block}.mlp.c_proj.bias": (width,)}
    return shapes


def _stream(expert: int, name: str) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64([VERSION, expert, zlib.crc32(name.encode())]))


def _write_files(place: Path, shapes: Shapes, files: dict[str, int], threads: int) -> None:
    head, offsets = _header(shapes)
    handles = {name: os.open(place / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC) for name in files}

    def write(name: str) -> None:
        base = base_values(name, shapes[name])
        for file, index in files.items():
            values = base + task_vector(name, shapes[name], index) if index else base
            _pwrite(handles[file], np.asarray(values, "<f4").tobytes(), offsets[name])

    try:
        for handle in handles.values():
            _pwrite(handle, head, 0)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(write, sorted(shapes, key=lambda name: -math.prod(shapes[name]))))
    finally:
        for handle in handles.values():
            os.close(handle)


def _header(shapes: Shapes) -> tuple[bytes, dict[str, int]]:
    table: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        table[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **table}).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + entry["data_offsets"][0] for name, entry in table.items()}


def _pwrite(handle: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(handle, view, offset)
        view, offset = view[done:], offset + done


def _read_manifest(place: Path) -> dict[str, list]:
    path = place / MANIFEST
    manifest = json.loads(path.read_text()) if path.exists() else {}
    return manifest["files"] if manifest.get("version") == VERSION else {}


def _intact(path: Path, mark: list | None) -> bool:
    return mark is not None and path.exists() and _mark(path) == mark


def _mark(path: Path) -> list:
    """Size, and a digest of a few pieces: tells another file, not a flipped bit."""
    size = path.stat().st_size
    return [size, hashlib.sha256(b"".join(_pieces(path, size))).hexdigest()]


def _pieces(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        for part in range(8):
            file.seek(size * part // 8)
            yield file.read(1 << 14)
