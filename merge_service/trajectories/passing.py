"""Makes all averages of a run in one pass over its checkpoints.

A block of each checkpoint is read once; every average that the checkpoint belongs to adds it to a running sum. What is summed are
differences from the newest checkpoint of the window, in float32 (float64 if the checkpoints are): so the sum is as exact as training
steps are small, and rounded once.

Files are made one after another (`Shardwise`): a pass that was stopped goes on with the first file that is missing.

Invariant: no output depends on blocks, threads, or where a pass was stopped. A number that all checkpoints of a window share comes
out as it is.
"""

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from merge_service.checkpoints.checkpoint import Checkpoint
from merge_service.checkpoints.dtypes import DTYPES, all_finite, encode, stored_finite
from merge_service.checkpoints.folders.shardwise import Shardwise
from merge_service.checkpoints.target import Target
from merge_service.checkpoints.weights import Weights
from merge_service.checkpoints.writer import CheckpointWriter, Layout
from merge_service.engine.stream_state import METADATA_KEY
from merge_service.errors import NonFiniteCheckpoint, TechniqueError
from merge_service.merging.derivation import Rules
from merge_service.merging.intake import check_inputs, shown, versions
from merge_service.trajectories.averages import Average, step_of

BLOCK = 1 << 15
"""Elements of a tensor that are averaged at a time."""


@dataclass(frozen=True)
class Places:
    """Where averages are written: each under its name in `out`, in shards of at most `shard_bytes`, floats as `dtype` (that of the
    newest checkpoint if None). `texts` are files by name that a folder gets beside its weights, by the average's name.
    """

    out: Path
    shard_bytes: int | None = None
    dtype: str | None = None
    texts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def target(self, average: Average, source: Path) -> Target:
        """The place of one average: a folder if the checkpoint is one that a library opens, else a file."""
        is_folder = source.is_dir() and any(
            (source / name).is_file() for name in ("config.json", "open_clip_config.json")
        )
        path = self.out / (average.name if is_folder else f"{average.name}.safetensors")
        found = Target.of(path, [source], self.shard_bytes)
        if found.folder is not None and not found.folder.is_open_clip:
            texts = self.texts.get(average.name, {})
            found = replace(found, folder=found.folder.written(texts=texts, changes={}))
        return replace(found, dtype=self.dtype)


@dataclass(frozen=True)
class Made:
    """The averages by name with the path to read each, how many checkpoints and files were read and written, and what the user
    should know.
    """

    paths: Mapping[str, Path]
    checkpoints: int
    written: int
    kept: int
    seconds: float
    notes: tuple[str, ...]


def average_along(
    paths: Sequence[Path], averages: Sequence[Average], places: Places, threads: int | None = None
) -> Made:
    """Make `averages` of the checkpoints `paths`, which are in the order of training.

    Raises `CheckpointError` naming a checkpoint that cannot be averaged with the newest, and `TechniqueError` without averages.
    """
    if not averages:
        raise TechniqueError("there is no average to make; give windows and shapes")
    began = time.perf_counter()
    first = min(one.places.start for one in averages)
    with contextlib.ExitStack() as stack:
        opened = {at: stack.enter_context(Checkpoint.open(paths[at])) for at in range(first, len(paths))}
        newest = opened[len(paths) - 1]
        every = list(opened.values())
        rules = Rules(any_base=True)
        notes, _ = check_inputs(newest, every, shown(every, [None] * len(every)), rules)
        outputs = [
            Shardwise(places.target(one, paths[one.end]), newest, _metadata(one, opened, newest))
            for one in averages
        ]
        missing = [set(output.missing) for output in outputs]
        with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
            for at, part in enumerate(outputs[0].parts):
                todo = [(one, out) for one, out, left in zip(averages, outputs, missing) if at in left]
                if todo:
                    _make_files(todo, at, part, opened, pool)
        made = {one.name: output.finish() for one, output in zip(averages, outputs)}
    files, written = sum(len(one.parts) for one in outputs), sum(map(len, missing))
    notes = tuple(dict.fromkeys((*notes, *(note for one in outputs for note in one.target.notes))))
    return Made(made, len(opened), written, files - written, time.perf_counter() - began, notes)


def _metadata(one: Average, opened: Mapping[int, Weights], newest: Weights) -> dict[str, str]:
    """What identifies an average: shape, window, and its checkpoints by file and quick digest."""
    inputs = [
        {"file": opened[at].path.name, "step": step_of(opened[at].path), "fingerprint": opened[at].fingerprint(), "weight": weight}
        for at, weight in zip(one.places, one.weights)
    ]  # fmt: skip
    record = {
        "form": "trajectory",
        "shape": one.shape,
        "window": one.window,
        "inputs": inputs,
        "versions": versions(),
    }
    return {"format": "pt", **newest.metadata, METADATA_KEY: json.dumps(record, sort_keys=True)}


def _make_files(
    todo: Sequence[tuple[Average, Shardwise]],
    at: int,
    part: Layout,
    opened: Mapping[int, Weights],
    pool: ThreadPoolExecutor,
) -> None:
    """Write file number `at` of several averages, block by block; none gets its name if one cannot be made."""
    with contextlib.ExitStack() as stack:
        writers = [(one, stack.enter_context(output.writer(at))) for one, output in todo]
        work = _Work(writers, opened)
        for name in part:
            size = work.newest.tensors[name].numel
            for _ in pool.map(
                lambda start, name=name: work.block(name, start), range(0, max(size, 1), BLOCK)
            ):
                pass


class _Work:
    """The blocks of one file of several averages."""

    def __init__(
        self, writers: Sequence[tuple[Average, CheckpointWriter]], opened: Mapping[int, Weights]
    ) -> None:
        self._writers, self._opened = writers, opened
        self._needed = sorted({at for one, _ in writers for at in one.places})
        self._ends = sorted({one.end for one, _ in writers})
        self.newest = opened[max(opened)]

    def block(self, name: str, start: int) -> None:
        """Average elements start.. of a tensor into every output."""
        stop = min(start + BLOCK, self.newest.tensors[name].numel)
        if not self.newest.tensors[name].kind.is_float:
            for one, writer in self._writers:
                writer.write_stored(name, start, self._opened[one.end].raw(name, start, stop))
            return
        read = {at: self._read(at, name, start, stop) for at in self._needed}
        for end in self._ends:
            last = read[end]
            moved: dict[int, np.ndarray] = {}
            for one, writer in self._writers:
                if one.end == end:
                    self._store(writer, name, start, _averaged(one, read, last, moved))

    def _read(self, at: int, name: str, start: int, stop: int) -> np.ndarray:
        block = self._opened[at].read(name, start, stop)
        if not all_finite(block):
            raise NonFiniteCheckpoint(
                f"{self._opened[at].path}: {name} has values NaN or infinite; leave this checkpoint out"
            )
        return block

    def _store(self, writer: CheckpointWriter, name: str, start: int, values: np.ndarray) -> None:
        kind = DTYPES[writer.tensors[name].dtype]
        with np.errstate(over="ignore"):
            stored = encode(values, kind)
        if not stored_finite(stored, kind):
            raise NonFiniteCheckpoint(
                f"{name} has values that {kind.name} cannot hold; write a wider dtype, bfloat16 or float32"
            )
        writer.write_stored(name, start, stored)


def _averaged(
    one: Average, read: Mapping[int, np.ndarray], last: np.ndarray, moved: dict[int, np.ndarray]
) -> np.ndarray:
    """The newest checkpoint plus the weighted differences of the older ones from it; `moved` keeps differences for other averages."""
    found = np.zeros_like(last)
    term = np.empty_like(last)
    for at, weight in zip(one.places, one.weights):
        if at == one.end:
            continue
        if at not in moved:
            moved[at] = read[at] - last
        np.multiply(moved[at], last.dtype.type(weight), out=term)
        found += term
    found += last
    return found
