"""The files of a weights directory: read strictly, written reproducibly.

Invariant: equal weights give equal bytes (the sha256 of the safetensors file is their identity), and a file is only loaded into a
model with its keys and shapes. No pickle is opened here or elsewhere.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from merge_service.checkpoints import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    CheckpointWriter,
    Ties,
    buffers,
    entry,
    of_groups,
    recorded,
    spare_prefix,
)
from merge_service.errors import IncompatibleCheckpoint, UserError

LISTED = 10  # differences shown in one error
_BIAS = " (a model with a logit_bias has init_logit_bias in its model_cfg)"
_DTYPES = {
    torch.float32: "F32",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def tied(model: torch.nn.Module) -> Ties:
    """For each state key that is the same tensor as another one, the name that it stands for."""
    groups: dict[tuple[int, int, tuple[int, ...]], list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.numel():
            place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape))
            groups.setdefault(place, []).append(name)
    return of_groups(groups.values())


def recorded_ties(file: Path) -> Ties:
    """The ties that the writer of a safetensors file recorded."""
    with open_weights(file) as checkpoint:
        return recorded(checkpoint)


def write_weights(state: Mapping[str, torch.Tensor], file: Path, ties: Ties) -> None:
    """Write `state` to the safetensors `file`, in its order: floats as fp32, integers as they are.

    Every key gets its own copy, tied or not, so that a strict loader finds them all; `ties` goes to the metadata.
    """
    plain = {name: t.detach().float() if t.is_floating_point() else t.detach() for name, t in state.items()}
    layout = {name: (_DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in plain.items()}
    with CheckpointWriter(file, layout, entry(ties)) as writer:
        for name, tensor in plain.items():
            writer.write(name, 0, tensor.cpu().contiguous().reshape(-1).numpy())


def load_strictly(model: torch.nn.Module, file: Path) -> None:
    """Copy the tensors of a safetensors file into `model`; every key and every shape must agree.

    Raises UserError (no such file), CorruptCheckpoint, IncompatibleCheckpoint with up to ten differences.
    """
    with open_weights(file) as checkpoint:
        fill(model, checkpoint)


def fill(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """As `load_strictly`, from an open checkpoint, into a model on the CPU."""
    admit(model, checkpoint)
    for name, tensor in model.state_dict().items():
        tensor.numpy()[...] = checkpoint.read(name).reshape(tensor.shape)


def admit(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Raise IncompatibleCheckpoint unless the checkpoint has every tensor of `model` and no other, by name and shape.

    A wrapper's prefix of all names (`module.`) is removed first, and buffers that the model computes and does not keep are left
    out; one number may be a scalar or a list of one.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = checkpoint.tensors.keys() - buffers(checkpoint)
    prefix = spare_prefix(names, expected.keys()) if names else ""
    if prefix:
        checkpoint.rename(prefix, "")
    for name in buffers(checkpoint) - expected.keys():
        del checkpoint.tensors[name]
    found = {name: tuple(info.shape) for name, info in checkpoint.tensors.items()}
    differences = list(_differences(expected, found))
    if differences:
        more = f"; and {len(differences) - LISTED} more" if len(differences) > LISTED else ""
        raise IncompatibleCheckpoint(
            f"{checkpoint.path} does not fit its model configuration: {'; '.join(differences[:LISTED])}{more}. "
            f"Check that the configuration belongs to these weights{_BIAS * ('logit_bias' in found.keys() - expected.keys())}"
        )


def _differences(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> Iterator[str]:
    yield from (f"{name} is missing" for name in expected if name not in found)
    yield from (f"{name} is not in the model" for name in found if name not in expected)
    for name in expected.keys() & found.keys():
        if found[name] != expected[name] and {math.prod(found[name]), math.prod(expected[name])} != {1}:
            yield f"{name} has shape {list(found[name])}, the model wants {list(expected[name])}"


def open_weights(file: Path) -> Checkpoint:
    """An open, validated safetensors file. Raises UserError if there is no such file, CorruptCheckpoint if it is damaged."""
    if not file.is_file():
        raise UserError(f"{file} is missing: a weights directory holds {WEIGHTS_FILE} and {CONFIG_FILE}")
    return Checkpoint.open(file)


def lengths(start: Path, end: Path) -> tuple[float, float]:
    """L2 norms of end - start and of start, two weights directories, over all float tensors (tied ones once), summed in fp64."""
    moved = begun = 0.0
    with open_weights(start / WEIGHTS_FILE) as checkpoint, open_weights(end / WEIGHTS_FILE) as after:
        ties = recorded(checkpoint)
        for name, info in checkpoint.tensors.items():
            if info.kind.is_float and name not in ties:
                old = checkpoint.read(name).astype(np.float64)
                difference = after.read(name) - old
                moved += float(np.dot(difference, difference))
                begun += float(np.dot(old, old))
    return float(np.sqrt(moved)), float(np.sqrt(begun))
