"""The state of a streaming merge on disk: what a technique keeps of the experts so far.

A safetensors file with the state's arrays for every merged tensor (`<array>:<tensor>`) and the text that names the experts (`inputs`,
which as an array is copied where a header would be parsed); its metadata records technique, parameters and base. The state is only a
cache: merging the experts again gives the same bits.

Invariant: a state is continued only with the technique, parameters and base it was started with, and never takes the same expert
id twice.
"""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merge_service.blocks.spans import Span
from merge_service.checkpoints.checkpoint import Checkpoint
from merge_service.checkpoints.dtypes import DTYPES
from merge_service.checkpoints.ties import Ties, recorded, take_apart
from merge_service.checkpoints.weights import Weights
from merge_service.checkpoints.writer import CheckpointWriter, Writer
from merge_service.engine.inputs import Inputs
from merge_service.engine.task import MergeTask
from merge_service.errors import CorruptCheckpoint, TechniqueError
from merge_service.files.digest import Checksum, Digest
from merge_service.techniques.definition import Technique
from merge_service.techniques.params import nearest
from merge_service.techniques.place import State

METADATA_KEY = "temporal_merge"
FORMAT, BEFORE = 4, 3
"""What is written, and what is continued all the same: a state whose metadata names the experts."""
NAMES = "inputs"
MAX_EXPERTS = 2**16 - 1
"""Votes are counted in 16 bits."""


class NoRoom(Exception):
    """A streaming state would take room on the disk that is needed for something else. The merge is possible without it."""


class StreamState:
    """An open state file; a context manager."""

    def __init__(self, path: Path | str) -> None:
        self.checkpoint = Checkpoint.open(path)
        try:
            self.record = json.loads(self.checkpoint.metadata[METADATA_KEY])
            self.inputs = self._inputs()
        except (KeyError, TypeError, ValueError):
            raise CorruptCheckpoint(f"{path} is not the state of a streaming merge of this version") from None

    def _inputs(self) -> Inputs:
        if self.record["state"] == BEFORE:
            return Inputs.of(self.record[NAMES])
        if self.record["state"] != FORMAT:
            raise KeyError
        return Inputs(self.checkpoint.raw(NAMES).tobytes().decode())

    def check(self, technique: Technique, params: Mapping[str, Any], base: Weights) -> None:
        """Raise `TechniqueError` unless the state was made with this technique, these parameters and this base."""
        for what, value in _identity(technique, params, base, len(self.inputs)).items():
            if self.record.get(what) != value:
                raise TechniqueError(
                    f"{self.checkpoint.path} was started with another {what}: {self.record.get(what)!r}, now {value!r}; "
                    "start again without a state"
                )

    def ties(self, base: Weights) -> Ties:
        """The ties that hold in every expert of the state; afterwards the base has an output layer of its own if the state has one."""
        take_apart(base, [key.partition(":")[2] for key in self.checkpoint.tensors])
        ties = self.record.get("ties")
        return recorded(base) if ties is None else dict(ties)

    def check_new(self, expert_id: str) -> None:
        """Raise `TechniqueError` if the id is taken or the state is full."""
        if self.inputs.has(expert_id):
            raise TechniqueError(
                f"the expert {expert_id!r} is already in {self.checkpoint.path}; give each expert its own id"
            )
        if len(self.inputs) >= MAX_EXPERTS:
            raise TechniqueError(
                f"{self.checkpoint.path} already holds {MAX_EXPERTS} experts, the most there can be"
            )

    def order_of(self, expert_id: str) -> int:
        """The number, from 1, of an expert in the state. Raises `TechniqueError` naming the experts it holds."""
        ids = [held["id"] for held in self.inputs]
        if expert_id not in ids:
            raise TechniqueError(
                f"the expert {expert_id!r} is not in {self.checkpoint.path}{nearest(expert_id, ids)}; it holds {', '.join(ids[:20])}"
            )
        return ids.index(expert_id) + 1

    def check_layout(self, task: MergeTask) -> None:
        """Raise `TechniqueError` unless the state has the arrays of every tensor of `task`."""
        for name, _ in task.merged:
            missing = [role for role in task.arrays(name) if f"{role}:{name}" not in self.checkpoint.tensors]
            if missing:
                raise TechniqueError(
                    f"{self.checkpoint.path} does not hold {missing[0]} of {name}, so another version wrote it; start again "
                    "without a state"
                )

    def read(self, span: Span, arrays: Mapping[str, np.dtype]) -> State:
        """The arrays of one span, to be changed in place."""
        return {
            role: self.checkpoint.raw(f"{role}:{span.name}", span.start, span.stop).astype(dtype)
            for role, dtype in arrays.items()
        }

    def __enter__(self) -> "StreamState":
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpoint.close()


@dataclass(frozen=True)
class Ends:
    """The state that a merge continues (`held`), where its result goes (`out`), and where its new state goes (`keep`)."""

    out: Writer | None
    held: StreamState | None = None
    keep: CheckpointWriter | None = None


def state_writer(path: Path | str, task: MergeTask, inputs: Inputs, durable: bool = True) -> CheckpointWriter:
    """A writer for the state that `task` leaves after `inputs`; `durable` as of `CheckpointWriter`."""
    assert task.base is not None
    record = {
        "state": FORMAT,
        **_identity(task.technique, task.params, task.base, len(inputs)),
        **({"ties": dict(task.tied)} if task.tied != recorded(task.base) else {}),
    }
    said = {METADATA_KEY: json.dumps(record, sort_keys=True)}
    names = np.frombuffer(inputs.text.encode(), np.uint8)
    layout = {**task.layout(), NAMES: ("U8", names.shape)}
    writer = CheckpointWriter(path, layout, said, Digest(Checksum), durable)
    try:
        writer.write_stored(NAMES, 0, names)
    except BaseException:
        writer.abort()
        raise
    return writer


def check_room(path: Path, task: MergeTask, reserve: int) -> None:
    """Raise `NoRoom` unless the state that `task` leaves fits at `path` and `reserve` bytes stay free."""
    size = sum(math.prod(shape) * DTYPES[dtype].itemsize for dtype, shape in task.layout().values())
    if shutil.disk_usage(path.parent).free < size + reserve:
        raise NoRoom(str(path))


def _identity(technique: Technique, params: Mapping[str, Any], base: Weights, experts: int) -> dict[str, Any]:
    held = effective(params, experts)
    if technique.resumes and "weight" in held:
        held["weight"] = None  # of a moving average, which may differ from arrival to arrival
    return {
        "technique": technique.name,
        "params": held,
        "base": base.fingerprint(),
        **({"source": technique.origin.source} if technique.origin is not None else {}),
    }


def effective(params: Mapping[str, Any], experts: int) -> dict[str, Any]:
    """The parameters that affect the first `experts` experts: lists with an entry for each are cut to that number."""
    lists = {
        name: params[name] for name in ("weights", "density") if isinstance(params.get(name), list | tuple)
    }
    return {**params, **{name: list(value[:experts]) for name, value in lists.items()}}
