"""A merge of adapters in a basis that they share (KnOTS, Stoica et al. 2024, arXiv 2410.19735), as an adapter.

Updates of low rank reach each other badly element by element, because each lies in directions of its own. Per matrix,
[τ_1 .. τ_N] = U S [V_1 .. V_N]; the merge is of the matrices S V_i, by any technique, and U brings the result back (eq. 3 to 5).

Invariant: only factors are computed with, never a matrix of the base's size. The result has the rank of all updates together, exactly.
"""

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merge_service.checkpoints.adapters.references import absolute
from merge_service.checkpoints.adapters.updates import Form, LowRank
from merge_service.checkpoints.checkpoint import Checkpoint
from merge_service.checkpoints.writer import CheckpointWriter
from merge_service.errors import CheckpointError, TechniqueError
from merge_service.merging.adapters.concatenate import low_rank, open_adapters
from merge_service.merging.adapters.written import Factors, Written, write
from merge_service.merging.combine import combine
from merge_service.merging.derivation import Derivation, Operator, Out, Rules, Way, members_of

CUTOFF = 1e-5
"""Singular values up to this are taken for none, as in the authors' code."""


@dataclass(frozen=True)
class _Shared:
    """One matrix of all updates: `basis` [rows, k] and the coordinates of every expert in it, [k, columns], float64."""

    name: str
    shape: tuple[int, ...]
    form: Form
    basis: np.ndarray
    coordinates: list[np.ndarray]


def merge_in_shared_basis(
    technique: str,
    params: Mapping[str, Any],
    base: Path,
    experts: Sequence[Path],
    out: Path,
    ids: Sequence[str | None] | None = None,
) -> Written:
    """Write the merge of these adapters as an adapter; thresholds of a technique are over coordinates in the shared basis.

    `ids` seed random masks. Raises `TechniqueError` for a technique that sees data, an expert that is no adapter of this base, or one that
    changes more than adding low-rank products, and `CheckpointError` if nothing differs from the base.
    """
    operator = Operator.of(technique, params, "merge")
    if operator.technique.evidence:
        raise TechniqueError(
            f"{technique} reads what was measured or learned in the model's own basis; leave --knots out"
        )
    with contextlib.ExitStack() as stack:
        origin, adapters, notes = open_adapters(stack, base, experts)
        parts = []
        for name in dict.fromkeys(name for one in adapters for name in one.updates):
            updates = [low_rank(one, name) if name in one.updates else None for one in adapters]
            form = next(one.form for one in updates if one is not None)
            basis, coordinates = shared_basis([None if one is None else _pair(one) for one in updates])
            if basis.shape[1]:
                parts.append(_Shared(name, origin.tensors[name].shape, form, basis, coordinates))
        if not parts:
            raise CheckpointError(f"the adapters change nothing of {base}: there is nothing to merge")
        merged = _merged(operator, parts, [None] * len(adapters) if ids is None else list(ids))
        modules, rank, size = write(out, absolute(base), [_factors(one, merged[one.name]) for one in parts])
    return Written(out, modules, rank, size, notes=notes)


def _pair(one: LowRank) -> tuple[np.ndarray, np.ndarray]:
    """The factors of an update as a matrix [out, in], however the base stores it."""
    left, right = one.factors()
    return (right.T * one.scale, left.T) if one.form == "transposed" else (left * one.scale, right)


def _factors(one: _Shared, coordinates: np.ndarray) -> Factors:
    basis = one.basis.astype(np.float32)
    left, right = (coordinates.T, basis.T) if one.form == "transposed" else (basis, coordinates)
    return Factors(one.name, one.shape, left, right, one.form)


def shared_basis(
    pairs: Sequence[tuple[np.ndarray, np.ndarray] | None],
) -> tuple[np.ndarray, list[np.ndarray]]:
    """U [m, k] and every S V_i [k, n] of the products left_i [m, r_i] @ right_i [r_i, n] side by side; None is a product of zeros.

    The largest number of a column of U is positive, so that the result does not depend on the signs that a library chooses.
    """
    given = [pair for pair in pairs if pair is not None]
    frame, corner = np.linalg.qr(np.concatenate([left for left, _ in given], axis=1))
    small, at = [], 0
    for left, right in given:
        small.append(corner[:, at : at + left.shape[1]] @ right)
        at += left.shape[1]
    squares, vectors = np.linalg.eigh(sum(one @ one.T for one in small))
    kept = np.sqrt(np.maximum(squares, 0.0)) > CUTOFF
    turn = vectors[:, kept][:, ::-1]
    basis = frame @ turn
    signs = (
        np.sign(np.take_along_axis(basis, np.abs(basis).argmax(0)[None], 0))[0] if basis.size else np.ones(0)
    )
    found = iter(small)
    nothing = np.zeros((basis.shape[1], given[0][1].shape[1]))
    return basis * signs, [nothing if pair is None else (turn * signs).T @ next(found) for pair in pairs]


def _merged(operator: Operator, parts: Sequence[_Shared], ids: Sequence[str | None]) -> dict[str, np.ndarray]:
    """The merge of the coordinates, float32 [k, columns] by tensor: experts whose base is zero."""
    layout = {one.name: ("F32", (one.basis.shape[1], one.coordinates[0].shape[1])) for one in parts}
    with tempfile.TemporaryDirectory(prefix="temporal-merge-") as name:
        room = Path(name)
        files = [room / f"{number}.safetensors" for number in range(len(ids) + 1)]
        for at, file in enumerate(files):
            with CheckpointWriter(file, layout, durable=False) as writer:
                for one in parts:
                    values = one.coordinates[at - 1] if at else np.zeros(layout[one.name][1])
                    writer.write(one.name, 0, np.ascontiguousarray(values, np.float32).reshape(-1))
        derivation = Derivation(operator, files[0], members_of(files[1:], ids, None))
        combine(derivation, Out(room / "out.safetensors"), Way(rules=Rules(any_base=True)))
        with Checkpoint.open(room / "out.safetensors") as held:
            return {name: held.read(name).reshape(shape).copy() for name, (_, shape) in layout.items()}
