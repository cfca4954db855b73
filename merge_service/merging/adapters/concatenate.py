"""A merge of adapters of one base as an adapter, without rounding to a rank: factors side by side.

A linear technique adds c_i * s_i * B_i A_i for every expert i. The factor c_i of a tensor is found by the technique itself: it merges
unit vectors under the tensor's name, so weights, coefficients and factors by depth count as in a merge of whole models.

Invariant: the adapter on the base has the weights of the merge of the full models, up to the rounding of float32.
"""

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from merge_service.checkpoints.adapters.adapted import Adapted
from merge_service.checkpoints.adapters.opening import open_weights
from merge_service.checkpoints.adapters.references import absolute
from merge_service.checkpoints.adapters.updates import LowRank
from merge_service.checkpoints.checkpoint import Checkpoint
from merge_service.checkpoints.weights import Weights
from merge_service.checkpoints.writer import CheckpointWriter
from merge_service.errors import TechniqueError
from merge_service.merging.adapters.written import Factors, Written, write
from merge_service.merging.combine import combine
from merge_service.merging.derivation import Derivation, Operator, Out, Rules, Way, members_of
from merge_service.merging.intake import check_inputs, shown

LINEAR = ("average", "task_arithmetic", "lines_task_arithmetic")
"""Techniques whose result is a sum of task vectors, each times a number per tensor."""


def concatenate(
    technique: str, params: Mapping[str, Any], base: Path, experts: Sequence[Path], out: Path
) -> Written:
    """Write the merge of these adapters as an adapter. Its rank is the sum of theirs.

    Raises `TechniqueError` for another technique, an expert that is no adapter of this base, or one that changes more than adding
    low-rank products.
    """
    if technique not in LINEAR:
        raise TechniqueError(
            f"{technique} is not linear in the experts, so its result has no exact factors; give --rank for the nearest adapter of a rank"
        )
    with contextlib.ExitStack() as stack:
        origin, adapters, notes = open_adapters(stack, base, experts)
        factors = _factors(technique, params, origin, len(adapters))
        parts = []
        for name in dict.fromkeys(name for one in adapters for name in one.updates):
            found = [
                (low_rank(one, name), weight)
                for one, weight in zip(adapters, factors[name])
                if name in one.updates
            ]
            pairs = [(one.factors(), one.scale * weight) for one, weight in found]
            left = np.concatenate([pair[0] * np.float32(scale) for pair, scale in pairs], axis=1)
            right = np.concatenate([pair[1] for pair, _ in pairs], axis=0)
            parts.append(Factors(name, origin.tensors[name].shape, left, right, found[0][0].form))
        modules, rank, size = write(out, absolute(base), parts)
    return Written(out, modules, rank, size, notes=notes)


def open_adapters(
    stack: contextlib.ExitStack, base: Path, experts: Sequence[Path]
) -> tuple[Weights, list[Adapted], tuple[str, ...]]:
    """The base, the adapters of it until `stack` is closed, and notes about them. Raises `TechniqueError` for anything else."""
    origin = stack.enter_context(open_weights(base))
    opened = [stack.enter_context(open_weights(path, base)) for path in experts]
    adapters = [_adapter_of(one, origin, path) for one, path in zip(opened, experts)]
    notes, _ = check_inputs(origin, adapters, shown(adapters, [None] * len(adapters)), Rules())
    return origin, adapters, notes


def _adapter_of(weights: Weights, origin: Weights, path: Path) -> Adapted:
    if not isinstance(weights, Adapted):
        raise TechniqueError(f"{path} is no adapter; give --rank for the nearest adapter of a rank")
    if weights.of.fingerprint() != origin.fingerprint():
        raise TechniqueError(
            f"{path} is an adapter of {weights.of.path}, not of {origin.path}; only adapters of one base add up to an adapter of it"
        )
    other = next(
        (name for name, one in weights.updates.items() if not isinstance(one, LowRank) or one.shape[1] == 1),
        None,
    )
    if other is not None:
        raise TechniqueError(
            f"{path} does more to {other} than adding a low-rank product (DoRA, a bias, or a copy); give --rank for the nearest adapter "
            "of a rank, or --out for the whole model"
        )
    return weights


def low_rank(one: Adapted, name: str) -> LowRank:
    update = one.updates[name]
    assert isinstance(update, LowRank)
    return update


def _factors(technique: str, params: Mapping[str, Any], origin: Weights, count: int) -> dict[str, np.ndarray]:
    """The number that every expert's task vector is multiplied by, [count] by tensor. Raises `TechniqueError` if they do not add to a
    merge that leaves equal models as they are.
    """
    layout = {name: ("F64", (count + 2,)) for name, info in origin.tensors.items() if info.kind.is_float}
    with tempfile.TemporaryDirectory(prefix="temporal-merge-") as name:
        room = Path(name)
        files = [room / f"{number}.safetensors" for number in range(count + 1)]
        for at, file in enumerate(files):
            with CheckpointWriter(file, layout) as writer:
                for number, tensor in enumerate(
                    layout, 1
                ):  # the number keeps equal tensors from being taken for tied ones
                    row = np.array([*np.eye(count + 1)[at - 1 if at else count][:count], 1.0, float(number)])
                    writer.write(tensor, 0, row)
        members = members_of(files[1:], [str(number) for number in range(count)], None)
        derivation = Derivation(Operator.of(technique, params, "merge"), files[0], members)
        combine(derivation, Out(room / "out.safetensors"), Way(rules=Rules(any_base=True)))
        with Checkpoint.open(room / "out.safetensors") as held:
            found = {tensor: held.read(tensor).copy() for tensor in layout}
    wrong = next((tensor for tensor, row in found.items() if abs(row[count] - 1) > 1e-9), None)
    if wrong is not None:
        raise TechniqueError(
            f"{technique} with these parameters changes {wrong} where all experts agree with the base, so no adapter equals it"
        )
    return {tensor: row[:count] for tensor, row in found.items()}
