"""One expert, from its initial weights to a checked weights directory.

Invariant: the result depends on the job alone. A run that was stopped anywhere and started again writes the same bytes
as one that was not, at the same number of threads and ranks on the same kind of device: batches are a function of the
step, the engine's state is kept exactly, and nothing is seeded globally.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch
from torch import distributed

from merge_service.checkpoints import Checkpoint, admit, check_finite
from merge_service.errors import UserError
from workers.data.batches import Batches
from workers.feed.device import Host, device_of
from workers.feed.pixels import Pixels
from workers.feed.ring import Batch, feed
from workers.jobs import EngineSpec, TrainJob, TrainResult
from workers.models.base import check_temperature
from workers.models.model import load, preprocess_cfg, save, tokenizer
from workers.models.weights import lengths
from workers.training import low_rank
from workers.training.checkpoints import Checkpoints, Due, LoopState, Progress
from workers.training.engines.make import make_engine
from workers.training.engines.protocol import Engine
from workers.training.numbers import Numbers, Pending
from workers.training.preparation import prepare
from workers.training.recipe import Recipe
from workers.training.usage import Usage

POINTS = ("train.start", "train.after_step", "train.after_ckpt", "train.before_commit")
CURVE = 200  # points of a reported loss curve, at most
PATIENCE = 40  # steps in a row that fp16 may skip: enough to bring its loss scale down from 2^16 to 2^-24

Hooks = Mapping[str, Callable[[int], None]]


class ExpertError(UserError):
    """An expert cannot be trained as asked; the message names the task, t, and the step where there is one."""


def train_expert(job: TrainJob, rank: int = 0, world: int = 1, hooks: Hooks | None = None) -> TrainResult:
    """Train one expert; collective over `world` ranks, each a process that has joined the group (`engine.join_group`).

    Rank 0 leaves the weights directory in `job.out`. `hooks` maps a name of `POINTS` to a function called there with the number of
    steps done. Raises ExpertError, or a CheckpointError when initial weights or result do not fit the base.
    """
    recipe = Recipe.model_validate(job.recipe)
    _check(job, recipe, world)
    with _numerics(job.engine, recipe.tf32):
        init = Path(job.init)
        device = device_of(job.engine.device)
        model = load(init, device.place)
        if getattr(model, "logit_bias", None) is None:
            who = f"task {job.task!r} (t={job.t}): the model in {init}"
            check_temperature(float(model.get_parameter("logit_scale").detach().reshape(-1)[0]), who)
        prepare(
            model,
            recipe,
            job.activation_checkpointing,
            f"task {job.task!r} (t={job.t}): the model in {init}",
            job.seed,
        )
        preprocess = preprocess_cfg(init)
        shares = Batches(job, tokenizer(init), preprocess, rank, world)
        pixels = Pixels(preprocess, device.place, recipe.channels_last)
        engine = make_engine(model, recipe, job.steps, job.engine, job.seed, rank)
        with closing(engine), Usage(job.engine.device) as usage:
            loop = _Loop(job, recipe, device, rank, hooks or {})
            loop.resume(engine)
            with closing(feed(shares, pixels, device, range(loop.start, job.steps), job.loaders)) as batches:
                result = loop.run(engine, batches)
            state = engine.weights()
        result["system"] = usage.samples
        if rank == 0:
            result.update(_hand_over(job, recipe, state))
        _fire(hooks or {}, "train.before_commit", job.steps)
    return result


class _Distances(TypedDict):
    task_vector_norm: float | None
    drift: float | None
    relative_drift: float | None


class _Loop:
    """The steps of one expert, with what surrounds a step: checkpoints, progress, the loss curve, refusal of NaN."""

    def __init__(self, job: TrainJob, recipe: Recipe, device: Host, rank: int, hooks: Hooks) -> None:
        self._job, self._recipe, self._device, self._rank, self._hooks = job, recipe, device, rank, hooks
        scratch = Path(job.scratch)
        scratch.mkdir(parents=True, exist_ok=True)
        self._checkpoints = Checkpoints(scratch, job.fingerprint)
        self._progress = Progress(scratch, job.steps)
        self._stride = math.ceil(job.steps / CURVE)
        self._curve: list[list[float]] = []
        self._losses: list[float] = []
        self._rates: list[float] = []
        self._norms: list[float] = []
        self._seconds = 0.0
        self._skipped = 0
        self._resumed: int | None = None
        self._writing: tuple[int, Future[None]] | None = None

    @property
    def start(self) -> int:
        """The first step to take, 0-based."""
        return self._resumed or 0

    def run(self, engine: Engine, batches: Iterable[tuple[int, Batch]]) -> TrainResult:
        """Take the steps of `batches`. The numbers of a step, and whether a checkpoint is written, come to be known some steps later on a
        GPU; a step that is refused is named all the same, and no checkpoint holds its weights."""
        _fire(self._hooks, "train.start", self.start)
        steps, before, began = self._job.steps, self._seconds, time.perf_counter()
        pending = Pending(self._device)
        due = Due(self._job, self.start, partial(_from_rank_zero, engine=self._job.engine))
        with self._device.helpers(1) as beside:
            for step, batch in batches:
                report = engine.step(*batch)
                self._note(pending.add(step, report))
                self._seconds = before + time.perf_counter() - began
                _fire(self._hooks, "train.after_step", step + 1)
                self._look_after_checkpoint(wait=False)
                if step + 1 < steps and due(step + 1):
                    self._note(pending.rest())
                    self._checkpoint(engine, step + 1, beside)
            self._note(pending.rest())
            self._seconds = before + time.perf_counter() - began
            self._look_after_checkpoint(wait=True)
        if self._rank == 0:
            self._checkpoints.check()
        samples = steps * self._recipe.batch_size
        return {
            "steps": steps,
            "samples": samples,
            "seconds": self._seconds,
            "samples_per_second": samples / self._seconds if self._seconds else 0.0,
            "loss": self._curve,
            "lr": _ends(self._rates),
            "grad_norm": _ends(self._norms),
            "task_vector_norm": None,
            "drift": None,
            "relative_drift": None,
            "resumed_from": self._resumed,
        }

    def _note(self, reports: Iterable[Numbers]) -> None:
        for numbers in reports:
            self._note_one(*numbers)

    def _note_one(self, step: int, loss: float, norm: float, lr: float) -> None:
        self._skipped = 0 if math.isfinite(norm) else self._skipped + 1
        if not math.isfinite(loss) or self._skipped > (PATIENCE if self._recipe.precision == "fp16" else 0):
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
            raise ExpertError(
                f"task {self._job.task!r} (t={self._job.t}): {what} at step {step + 1} of {self._job.steps}, lr "
                f"{lr:.3g}. Lower recipe.lr, train in fp32, or look at the data of this task"
            )
        self._losses.append(loss)
        self._rates.append(lr)
        self._norms += [norm] if math.isfinite(norm) else []
        if (step + 1) % self._stride == 0 or step + 1 == self._job.steps:
            self._curve.append([step + 1, math.fsum(self._losses) / len(self._losses)])
            self._losses.clear()
        if self._rank == 0:
            self._progress.tell(step + 1, (step + 1) * self._recipe.batch_size, loss)

    def resume(self, engine: Engine) -> None:
        """Go on from the newest complete checkpoint, if there is one; rank 0 judges, the others follow."""
        if self._rank == 0:
            self._checkpoints.claim()
        newest = self._checkpoints.newest() if self._rank == 0 else 0
        step = _from_rank_zero(newest, self._job.engine)
        if step == 0:
            return
        directory, loop = self._checkpoints.judged(step)
        engine.load(directory)
        self._curve, self._losses = loop["curve"], loop["losses"]
        self._rates, self._norms, self._seconds = loop["rates"], loop.get("norms", []), loop["seconds"]
        self._resumed = step

    def _checkpoint(self, engine: Engine, step: int, beside: Executor) -> None:
        """Take hold of the state after `step` steps and have rank 0 write it beside training; of one checkpoint at a time."""
        self._look_after_checkpoint(wait=True)
        if self._rank == 0:
            self._checkpoints.stage(step)
        _barrier(self._job.engine)
        write = engine.save(self._checkpoints.staged(step))
        _barrier(self._job.engine)
        loop: LoopState = {
            "curve": list(self._curve),
            "losses": list(self._losses),
            "rates": _ends(self._rates),
            "norms": _ends(self._norms),
            "seconds": self._seconds,
        }

        def complete() -> None:
            write()
            if self._rank == 0:
                self._checkpoints.complete(step, loop)

        self._writing = (step, beside.submit(complete))
        self._look_after_checkpoint(wait=False)

    def _look_after_checkpoint(self, wait: bool) -> None:
        """Say so once a checkpoint is complete; raises what went wrong with it."""
        if self._writing is not None and (wait or self._writing[1].done()):
            step, written = self._writing
            self._writing = None
            written.result()
            _fire(self._hooks, "train.after_ckpt", step)


def _ends(values: list[float]) -> list[float]:
    """[first, highest, last]; nothing of nothing, as where fp16 skipped every step."""
    return [values[0], max(values), values[-1]] if values else []


def _check(job: TrainJob, recipe: Recipe, world: int) -> None:
    assert world == job.engine.world, f"{world} ranks run a job made for {job.engine.world}"
    where = f"task {job.task!r} (t={job.t})"
    if job.steps < 1:
        raise ExpertError(f"{where}: the budget gives {job.steps} steps; it must give at least one")
    if rest := recipe.batch_size % (parts := world * recipe.accumulate):
        among = f"{world} workers" + (f" in {recipe.accumulate} parts each" if recipe.accumulate > 1 else "")
        raise ExpertError(
            f"{where}: recipe.batch_size {recipe.batch_size} cannot be shared evenly by {among}; "
            f"{recipe.batch_size - rest} or {recipe.batch_size + parts - rest} can"
        )


def _hand_over(job: TrainJob, recipe: Recipe, state: Mapping[str, torch.Tensor]) -> _Distances:
    """Write the expert, check the written file against the base, and measure how far it is from the base and from its start."""
    out, base = Path(job.out), Path(job.base)
    if recipe.adapter is None:
        save(state, Path(job.init), out)
    else:
        low_rank.save(state, recipe.adapter, Path(job.init), out)
    who = f"the expert of task {job.task!r} (t={job.t})"
    with Checkpoint.open(base) as reference, Checkpoint.open(out) as expert:
        admit(reference, expert, who)
        check_finite(expert, who)
    norm, _ = lengths(base, out)
    drift, start = lengths(Path(job.init), out)
    return {"task_vector_norm": norm, "drift": drift, "relative_drift": drift / start if start else 0.0}


@contextmanager
def _numerics(engine: EngineSpec, tf32: bool) -> Iterator[None]:
    """Fix what decides the bits: the number of threads, and on a GPU the deterministic kernels and whether products are in TF32.

    CPU kernels are deterministic for a fixed number of threads, so nothing is switched there. On a GPU a kernel without a
    deterministic form only warns: bit-identity is then promised per checkpoint, not across runs.
    """
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(engine.threads)
    if engine.device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def _from_rank_zero(number: int, engine: EngineSpec) -> int:
    if engine.world == 1:
        return number
    told = torch.tensor([number], device=engine.device)
    distributed.broadcast(told, 0)
    return int(told)


def _barrier(engine: EngineSpec) -> None:
    if engine.world > 1:
        distributed.barrier()


def _fire(hooks: Hooks, point: str, step: int) -> None:
    assert hooks.keys() <= set(POINTS), f"unknown fault points {hooks.keys() - set(POINTS)}"
    if point in hooks:
        hooks[point](step)
