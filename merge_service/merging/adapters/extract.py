"""An adapter out of the difference of two models: the best factors of a given rank for every matrix, by singular values.

The truncated singular value decomposition is the nearest matrix of that rank (Eckart and Young, 1936). What an adapter does not
hold (norms, biases, parameters outside modules) counts in the residual and is named.

Invariant: one matrix is in memory at a time.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np

from merge_service.blocks.singular import frame
from merge_service.checkpoints.adapters.opening import open_weights
from merge_service.checkpoints.adapters.references import absolute
from merge_service.checkpoints.adapters.updates import Form
from merge_service.checkpoints.admission import admit, check_finite
from merge_service.checkpoints.buffers import buffers
from merge_service.checkpoints.header import TensorInfo
from merge_service.checkpoints.relation import check_related
from merge_service.checkpoints.ties import tie
from merge_service.checkpoints.unmergeable import check_mergeable
from merge_service.checkpoints.weights import Weights
from merge_service.errors import CheckpointError, TechniqueError
from merge_service.merging.adapters.written import Factors, Written, write

_MODULE = re.compile(r"(?:.*\.)?(?:weight|in_proj_weight)")
_EMBEDDING = re.compile(r"(?:^|[._])(?:wte|wpe|shared|embed\w*|\w*embeddings?)\.weight$")
_COLUMNS = re.compile(r"(?:^|\.)(?:c_attn|c_fc|c_proj|q_attn)\.weight$")


@dataclass
class _Sums:
    """Squares of what moved, of what is not held at all, and of what a rank leaves, over all tensors."""

    moved: float = 0.0
    left_out: float = 0.0
    cut: float = 0.0
    without: list[str] = field(default_factory=list)


def extract(
    finetuned: Path, base: Path, rank: int, out: Path, any_base: bool = False, name: str | None = None
) -> Written:
    """Write the adapter of `rank` that brings `base` nearest to `finetuned`.

    Raises `TechniqueError` for a rank below 1, `CheckpointError` for models that do not fit each other or do not differ; with
    `any_base` the two need not be related. `name` stands for the fine-tuned model in messages, by default its path.
    """
    if rank < 1:
        raise TechniqueError(f"an adapter of rank {rank} holds nothing; give a rank of at least 1")
    from threadpoolctl import threadpool_limits

    with open_weights(base) as origin, open_weights(finetuned, base) as expert:
        for who, one in (("the base", origin), ("the fine-tuned model", expert)):
            check_mergeable(one, who)
        tied = tie(origin, [expert])
        notes = admit(origin, expert, "the fine-tuned model")
        if not any_base:
            check_related(origin, expert, "the fine-tuned model")
        for who, one in (("the base", origin), ("the fine-tuned model", expert)):
            check_finite(one, who)
        sums = _Sums()
        with threadpool_limits(1, user_api="blas"):
            parts = list(_parts(origin, expert, tied.keys() | buffers(origin), rank, sums))
    if not parts:
        what = "does not differ from the base" if not sums.moved else "differs in no matrix of a module"
        raise CheckpointError(f"{name or finetuned} {what}: there is nothing to extract")
    modules, largest, size = write(out, absolute(base), parts)
    share = [math.sqrt(part / sums.moved) for part in (sums.left_out + sums.cut, sums.left_out)]
    return Written(out, modules, largest, size, share[0], share[1], tuple(sums.without), notes)


def _parts(origin: Weights, expert: Weights, without: set[str], rank: int, sums: _Sums) -> Iterator[Factors]:
    columns = _is_by_columns(origin)
    for name, info in origin.tensors.items():
        if not info.kind.is_float or name in without or not info.numel:
            continue
        delta = np.subtract(expert.read(name), origin.read(name), dtype=np.float32)
        square = float(np.dot(delta, delta.astype(np.float64)))
        sums.moved += square
        if not square:
            continue
        if len(info.shape) < 2 or not _MODULE.fullmatch(name):
            sums.left_out += square
            sums.without.append(name)
            continue
        left, right = nearest(delta.reshape(info.shape[0], prod(info.shape[1:])), rank)
        kept = np.einsum("ij,ij->", left.T @ left, right @ right.T, dtype=np.float64)
        sums.cut += max(square - float(kept), 0.0)
        yield Factors(
            name, info.shape, left.astype(np.float32), right.astype(np.float32), _form(name, info, columns)
        )


def nearest(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors [rows, r] and [r, columns] of the matrix of at most `rank` that is nearest, float64."""
    rows, columns = matrix.shape
    if rows >= columns:
        right = frame(matrix, np, rank)[1][:, ::-1]
        return matrix @ right, right.T
    left = frame(matrix.T, np, rank)[1][:, ::-1]
    return left, left.T @ matrix


def _form(name: str, info: TensorInfo, columns: bool) -> Form:
    if _EMBEDDING.search(name) and len(info.shape) == 2:
        return "embedding"
    return "transposed" if columns and _COLUMNS.search(name) else "linear"


def _is_by_columns(origin: Weights) -> bool:
    """Whether the model stores the matrices of its blocks as [in, out], as GPT-2 does: its q, k and v then lie in columns."""
    packed = (info.shape for name, info in origin.tensors.items() if name.endswith("c_attn.weight"))
    return any(len(shape) == 2 and shape[1] == 3 * shape[0] for shape in packed)
