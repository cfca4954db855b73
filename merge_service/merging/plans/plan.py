"""The plan of a merge: bytes read and written, memory, disk, shards and shares of workers, before anything is written.

Inputs are admitted and tasks are made by the functions that the merge itself uses, over weights of which only headers are read
(`Unread`). Seconds are bytes over a throughput, which is measured on a part of the inputs or assumed, and the plan says which.

Invariant: nothing is written, and no tensor is read but what a measurement reads.
"""

import contextlib
import dataclasses
import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_service.blocks.search import COUNTS, SAMPLE, SURVEYS
from merge_service.blocks.spans import BLOCK
from merge_service.checkpoints import ties
from merge_service.checkpoints.checkpoint import Checkpoint
from merge_service.checkpoints.header import TensorInfo
from merge_service.checkpoints.target import Laid, Target
from merge_service.checkpoints.weights import Weights
from merge_service.engine.split import cut
from merge_service.engine.task import MergeTask
from merge_service.files.ranges import is_far
from merge_service.merging.combine import Taken, taken_in, task_of
from merge_service.merging.derivation import Derivation, Out, Way
from merge_service.merging.intake import check_count, open_all
from merge_service.merging.parts import Group, Opening, admit_groups, laid_out, tasks_of
from merge_service.merging.plans.asked import asked
from merge_service.merging.plans.unread import Unread

PROCESS = 90 << 20
"""Bytes of a process with its libraries."""
ASSUMED = 4 * 10**8
"""Bytes per second and thread that reading and computing are taken for where nothing was measured: an SSD, or a core that hashes."""
PIECE = 4 << 20
MEASURED = 64 << 20
"""Most bytes that a measurement reads, in pieces of `PIECE`."""
SECONDS = 2.0
"""Longest measurement."""


@dataclass(frozen=True)
class Throughput:
    """Bytes per second of one thread, and where the number is from."""

    rate: float
    source: str


@dataclass(frozen=True)
class MergePlan:
    """What a merge will take. `read` has bytes by what they are read for; `passes` is their sum over the size of the inputs. `disk` is what
    must be free at `place`, where `free` are. `shares` are the bytes that each worker reads. `memory` does not count pages of files, which
    the system drops when it needs room.
    """

    technique: str
    experts: int
    inputs: int
    read: Mapping[str, int]
    written: int
    shards: int
    memory: int
    disk: int
    place: Path
    free: int
    seconds: float
    throughput: Throughput
    shares: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def passes(self) -> float:
        """How many times the inputs are read."""
        return sum(self.read.values()) / self.inputs if self.inputs else 0.0

    @property
    def fits(self) -> bool:
        """Whether the result has room on its disk."""
        return self.disk <= self.free


def plan_merge(derivation: Derivation, out: Out, way: Way, workers: int = 1) -> MergePlan:
    """The plan of `merging.streaming.merge_all`. Raises what that raises for inputs that headers show to be wrong."""
    check_count(derivation)
    operator = derivation.operator
    loose = dataclasses.replace(way, rules=dataclasses.replace(way.rules, any_base=True))
    with contextlib.ExitStack() as stack:
        anchor, opened = open_all(stack, derivation.base, derivation.paths, way.rules)
        base, seen = None if anchor is None else Unread(anchor), [Unread(one) for one in opened]
        known, tied = taken_in(derivation, base, seen, loose)
        target = out.target(derivation.sources, ties.apart(base or seen[0], tied))
        task = task_of(operator, target, base, seen, Taken(known, tied, [None] * len(seen)))
        every: list[Weights] = [one for one in (anchor, *opened) if one is not None]
        sheet = _Sheet([task], target, task.reference, every, way.execution.threads, workers)
        return sheet.plan(operator.technique.name, known.notes)


def plan_groups(
    groups: Sequence[Group], technique: str, out: Out, way: Way, ids: Mapping[Path, str] = {}
) -> MergePlan:
    """The plan of `combine_groups`. Raises as `plan_merge`."""
    loose = dataclasses.replace(way, rules=dataclasses.replace(way.rules, any_base=True))
    with contextlib.ExitStack() as stack:
        every: dict[Path, Weights] = {}

        def seen(weights: Weights) -> Weights:
            every[weights.path] = weights
            return Unread(weights)

        _, admitted, notes = admit_groups(groups, ids, loose, Opening(stack, seen))
        target, whole = laid_out(groups, admitted, out)
        tasks = [task for one in admitted for task in tasks_of(one, target)]
        sheet = _Sheet(tasks, target, whole, list(every.values()), way.execution.threads, 1)
        return sheet.plan(technique, notes)


@dataclass(frozen=True)
class _Sheet:
    """What a plan is made of: the tasks, where and with which layout they write, and the opened inputs."""

    tasks: Sequence[MergeTask]
    target: Target
    laid: Laid
    every: Sequence[Weights]
    threads: int
    workers: int

    def plan(self, technique: str, notes: Sequence[str]) -> MergePlan:
        """The plan, with further notes."""
        place, read, written = _there(self.target.path), self._read(), _size(self.target, self.laid)
        state = sum(map(_state, self.tasks))
        count = max((len(task.inputs) for task in self.tasks), default=0)
        if state:
            read["states"] = state * (count - 1)
        shares = self._shares()
        pace = measured(self.every) or Throughput(ASSUMED, "assumed")
        lanes = max(self.threads, 1) * max(len(shares), 1)
        moved = sum(read.values()) + written + state * count
        return MergePlan(
            technique=technique,
            experts=count,
            inputs=_of_files(self.every),
            read=read,
            written=written + state * count,
            shards=len(self.target.parts(self.laid.tensors)),
            memory=PROCESS + max((self._memory(task) for task in self.tasks), default=0),
            disk=written + 2 * state,
            place=place,
            free=shutil.disk_usage(place).free,
            seconds=moved / (pace.rate * lanes),
            throughput=pace,
            shares=shares,
            notes=tuple(dict.fromkeys((*notes, *self.target.notes, *self._remarks()))),
        )

    def _read(self) -> dict[str, int]:
        """Bytes by what they are read for; every file is read once to be named by its content."""
        read: Counter[str] = Counter({"sha256 and ids": _of_files(self.every)})
        for task in self.tasks:
            read.update(asked(task))
            names = [name for name, _ in task.merged]
            sources = [one.weights for one in task.inputs]
            if task.base is not None:
                sources.append(task.base)
            read["merge"] += sum(s.tensors[n].nbytes for s in sources for n in names if n in s.tensors)
            read["merge"] += sum(task.reference.tensors[name].nbytes for name, _ in task.copied)
        return {name: size for name, size in read.items() if size}

    def _shares(self) -> tuple[int, ...]:
        """Bytes of all inputs that each worker reads in one pass."""
        if self.workers == 1:
            return ()
        (task,) = self.tasks
        sources = [one.weights for one in task.inputs] + ([task.base] if task.base is not None else [])
        return tuple(
            sum(s.tensors[name].nbytes for s in sources for name in names if name in s.tensors)
            for names in cut(task, task.merged, self.workers)
        )

    def _memory(self, task: MergeTask) -> int:
        """Anonymous memory beside that of the process: blocks of every thread, and the counts of a search."""
        count = len(task.inputs)
        widest = max((task.compute(name).itemsize for name, _ in task.combined), default=4)
        if task.whole:
            largest = max((numel for name, numel in task.combined if task.packing.matrices(name)), default=0)
            own = largest * (widest * (count + 4) + 8 * (count + 2))
        else:
            own = BLOCK * widest * (count + 6)
        searches = any(name in ("thresholds", "sample") for name in asked(task)) or task.in_turn
        return self.threads * own + (8 * COUNTS + 4 * SAMPLE * SURVEYS if searches else 0)

    def _remarks(self) -> list[str]:
        said = []
        if any(task.in_turn for task in self.tasks):
            said.append(
                "thresholds are found tensor by tensor, while a tensor is in memory: they cost no pass of their own"
            )
        if any(not task.technique.portable for task in self.tasks):
            said.append("decompositions of matrices are not in the seconds")
        return said


def measured(every: Sequence[Weights]) -> Throughput | None:
    """Bytes per second of reading and hashing pieces of the inputs, spread over them; None if there is too little to read."""
    files = [
        (file, file.stat().st_size)
        for one in every
        if isinstance(one, Checkpoint)
        for file in one.files
        if not is_far(file)
    ]
    total = sum(size for _, size in files)
    if total < 2 * PIECE:
        return None
    count = min(MEASURED, total // 2) // PIECE
    began, done = time.perf_counter(), 0
    for at in range(count):
        file, size = files[at * len(files) // count]
        with file.open("rb") as handle:
            handle.seek(size * at // count)
            data = handle.read(PIECE)
        hashlib.sha256(data)
        done += len(data)
        if time.perf_counter() - began > SECONDS:
            break
    seconds = time.perf_counter() - began
    return Throughput(done / seconds, f"measured on {done >> 20} MiB of the inputs") if seconds else None


def _of_files(every: Sequence[Weights]) -> int:
    return sum(file.stat().st_size for file in {file for one in every for file in one.files})


def _state(task: MergeTask) -> int:
    """Bytes of the state that a technique writes which takes experts one after another; two of them exist at a time."""
    if not task.technique.ordered:
        return 0
    return sum(size * dtype.itemsize for name, _ in task.merged for size, dtype in task.held(name).values())


def _size(target: Target, laid: Laid) -> int:
    layouts = target.parts(laid.tensors)
    return sum(TensorInfo(d, tuple(s), 0).nbytes for layout in layouts for d, s in layout.values())


def _there(path: Path) -> Path:
    """The nearest folder that exists."""
    return next(one for one in path.absolute().parents if one.is_dir()) if not path.is_dir() else path
