"""Matrices packed in one tensor: q, k and v of attention, gate and up of an MLP, the experts of a mixture.

A technique that works on singular values needs the matrices one by one. Libraries pack them in different ways (rows or columns
one after another, or interleaved per head), and names and shapes do not always tell which. A tensor is therefore split only where
its name, its shape and the shape of the output projection beside it leave one reading, or where the `config.json` beside the
checkpoint gives the number of heads. Every other tensor stays one matrix, and the report names it.

Invariant: the matrices of a tensor hold each of its elements once.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

Array = Any
Shapes = Mapping[str, tuple[int, ...]]
Config = Mapping[str, int | bool | str]

_OUTPUTS = ("o_proj", "out_proj", "dense", "proj", "Wo", "c_proj", "wo")
_IN_ROWS = ("qkv", "Wqkv", "W_pack", "in_proj_weight", "qkv_proj")
_GATED = {
    "gate_up_proj": "down_proj", "Wi": "Wo", "dense_h_to_4h": "dense_4h_to_h", "w12": "w3", "weights_in": "weights_out",
    "fc1": "fc2", "input_linear": "output_linear",
}  # fmt: skip
"""Layers that may pack a gate and an up projection, and the layer that takes their product."""
_FUSED = ("query_key_value", "c_attn", "wqkv", "kv_b_proj", "att_proj")
"""Further layers that hold several matrices."""
_MIXED = ("input_linear", "output_linear")
"""Layers of Granite and JetMoE; where they have three axes, the first one counts experts."""
_PER_HEAD = ("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon")
_KEYS = {
    "model_type": ("model_type",),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "groups": ("num_kv_heads", "n_head_kv", "num_key_value_heads"),
    "grouped": ("new_decoder_architecture",),
    "multi_query": ("multi_query",),
}
_CONFIG_LIMIT = 1 << 20


@dataclass(frozen=True)
class Matrix:
    """One matrix of `shape`: elements `start..stop` of a flattened tensor, reshaped to `view`, at `index`."""

    start: int
    stop: int
    shape: tuple[int, int]
    view: tuple[int, ...]
    index: tuple[slice | int, ...] = ()

    def of(self, part: Array) -> Array:
        """The matrix, given elements start..stop of the tensor."""
        return part.reshape(self.view)[self.index].reshape(self.shape)

    def put(self, part: Array, matrix: Array) -> None:
        """Write the matrix into elements start..stop of the tensor."""
        place = part.reshape(self.view)
        place[self.index] = matrix.reshape(place[self.index].shape)


@dataclass(frozen=True)
class Packing:
    """How the tensors of one model are packed. `split`: packed matrices are taken apart; the experts of a mixture always are."""

    shapes: Shapes
    config: Config
    split: bool

    @classmethod
    def of(cls, shapes: Shapes, beside: Path | None, *, split: bool) -> "Packing":
        """The packing of a model with tensors of these shapes; `beside` is the path of its weights, if they are in a file."""
        return cls(shapes, _read(beside.parent / "config.json") if beside else {}, split)

    def matrices(self, name: str) -> list[Matrix]:
        """The matrices in a tensor; an empty list for a tensor that is no matrix."""
        shape = self.shapes[name]
        if 0 in shape:
            return []
        if len(shape) == 3 and ("experts" in name.split(".") or _layer(name) in _MIXED):
            return self._experts(name, shape)
        if len(shape) != 2:
            return []
        found = self._parts(name, shape) if self.split else None
        return found or [_whole(0, shape)]

    @cached_property
    def remarks(self) -> tuple[str, ...]:
        """Notes for the user: tensors that stayed whole although they hold several matrices."""
        doubtful: dict[str, list[str]] = {}
        for name, shape in self.shapes.items() if self.split else ():
            if _layer(name) in (*_IN_ROWS, *_FUSED) and len(shape) == 2 and not self._parts(name, shape):
                doubtful.setdefault(_layer(name), []).append(name)
        return tuple(
            f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: merged as one matrix, although several are packed "
            f"in {layer}; neither names and shapes nor a config.json beside the checkpoint say how"
            for layer, names in doubtful.items()
        )

    def _parts(self, name: str, shape: tuple[int, ...]) -> list[Matrix] | None:
        """The matrices packed in a matrix; None if there is only one, or if the layout is not known."""
        layer, (rows, columns) = _layer(name), shape
        if layer == "query_key_value":
            return self._query_key_value(rows, columns)
        if layer in _GATED:
            after = self._beside(name, _GATED[layer])
            return _rows(shape, [rows // 2] * 2) if after and rows == 2 * after[1] else None
        if layer == "c_attn":
            return self._c_attn(name, shape)
        if layer not in _IN_ROWS or (layer == "qkv_proj" and "self_attn" not in name.split(".")):
            return None  # CodeGen's attn.qkv_proj is cut into four before q, v and k
        if rows == 3 * columns:
            return _rows(shape, [columns] * 3)
        return _rows(shape, self._queries(name, rows))

    def _queries(self, name: str, rows: int) -> list[int]:
        """Rows of q, k and v, from the input width of the output projection; [] if that does not fit."""
        widths = {found[1] for output in _OUTPUTS if (found := self._beside(name, output))}
        if len(widths) != 1:
            return []
        (width,) = widths
        rest = rows - width
        return [width, rest // 2, rest // 2] if 0 < rest <= 2 * width and rest % 2 == 0 else []

    def _c_attn(self, name: str, shape: tuple[int, ...]) -> list[Matrix] | None:
        """GPT-2 stores weights as [in, out], so q, k, v (k, v in cross attention) lie in columns; Qwen stores them in rows."""
        rows, columns = shape
        if columns in (2 * rows, 3 * rows):
            count = columns // rows
            return [
                Matrix(0, rows * columns, (rows, rows), (rows, count, rows), (slice(None), k))
                for k in range(count)
            ]
        if rows == 3 * columns:  # GPT-BigCode has these interleaved per head
            return _rows(shape, [columns] * 3) if self.config.get("model_type") == "qwen" else None
        return _rows(shape, self._queries(name, rows))

    def _query_key_value(self, rows: int, columns: int) -> list[Matrix] | None:
        """Interleaved per head (GPT-NeoX, BLOOM), per group of heads or in rows (Falcon), as the configuration says."""
        kind, heads = self.config.get("model_type"), int(self.config.get("heads", 0))
        if kind in _PER_HEAD or (kind == "falcon" and not self._is_grouped):
            return _interleaved(rows, columns, heads, [1, 1, 1])
        if kind != "falcon":
            return None
        groups = int(self.config.get("groups", 0)) if self.config.get("grouped") else 1
        if not groups or heads % groups:
            return None
        return _interleaved(rows, columns, groups, [heads // groups, 1, 1])

    @property
    def _is_grouped(self) -> bool:
        return bool(self.config.get("grouped") or self.config.get("multi_query", True))

    def _experts(self, name: str, shape: tuple[int, ...]) -> list[Matrix]:
        """One matrix per expert; with `split`, gate and up separately: they lie in rows, or in columns where weights are [in,
        out].
        """
        count, rows, columns = shape
        size = rows * columns
        output = {"gate_up_proj": "down_proj", "input_linear": "output_linear"}.get(_layer(name))
        after = self._beside(name, output, 3) if self.split and output else None
        parts: list[Matrix] = []
        for start in range(0, count * size, size):
            stop = start + size
            if after and (rows, columns) == (2 * after[2], after[1]):
                parts += [
                    _whole(start, (rows // 2, columns)),
                    _whole(start + size // 2, (rows // 2, columns)),
                ]
            elif after and (rows, columns) == (after[2], 2 * after[1]):
                half = columns // 2
                alternate = f"{name}_bias" in self.shapes  # GPT-OSS: every other column
                view, first = ((rows, half, 2), 2) if alternate else ((rows, 2, half), 1)
                for k in range(2):
                    index = (slice(None), slice(None), k) if first == 2 else (slice(None), k)
                    parts.append(Matrix(start, stop, (rows, half), view, index))
            else:
                parts.append(_whole(start, (rows, columns)))
        return parts

    def _beside(self, name: str, layer: str, rank: int = 2) -> tuple[int, ...] | None:
        """The shape of the sibling layer with this name."""
        parent = name.removesuffix(".weight").rpartition(".")[0]
        for sibling in (f"{parent}.{layer}.weight", f"{parent}.{layer}"):
            if len(self.shapes.get(sibling, ())) == rank:
                return self.shapes[sibling]
        return None


def _layer(name: str) -> str:
    """The layer that a weight belongs to, or the parameter's own name."""
    parts = name.split(".")
    return parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]


def _whole(start: int, shape: Sequence[int]) -> Matrix:
    rows, columns = shape
    return Matrix(start, start + rows * columns, (rows, columns), (rows, columns))


def _rows(shape: Sequence[int], sizes: Sequence[int]) -> list[Matrix] | None:
    if not sizes or sum(sizes) != shape[0]:
        return None
    starts = [sum(sizes[:k]) * shape[1] for k in range(len(sizes))]
    return [_whole(start, (size, shape[1])) for start, size in zip(starts, sizes)]


def _interleaved(rows: int, columns: int, groups: int, heads: Sequence[int]) -> list[Matrix] | None:
    """Matrices of which every group of rows holds `heads[k]` heads, in order: [groups, sum(heads), head size, columns]."""
    each = groups * sum(heads)
    if not each or rows % each:
        return None
    size, ends = rows // each, [sum(heads[: k + 1]) for k in range(len(heads))]
    view = (groups, sum(heads), size, columns)
    return [
        Matrix(
            0, rows * columns, (groups * count * size, columns), view, (slice(None), slice(end - count, end))
        )
        for count, end in zip(heads, ends)
    ]


def _read(file: Path) -> Config:
    """The entries of a `config.json` that packing depends on; empty if the file is missing or invalid."""
    try:
        if file.stat().st_size > _CONFIG_LIMIT:
            return {}
        found: Any = json.loads(file.read_text(encoding="utf-8"))
        text = found.get("text_config")
        found = text if isinstance(text, dict) else found
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return {
        name: found[key]
        for name, keys in _KEYS.items()
        for key in reversed(keys)
        if isinstance(found.get(key), str if name == "model_type" else int)
    }
