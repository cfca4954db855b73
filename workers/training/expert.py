"""One expert, from its initial weights to a checked weights directory.

Invariant: the result depends on the job alone. A run that was stopped anywhere and started again writes the same bytes
as one that was not, at the same number of threads and ranks on the same kind of device: batches are a function of the
step, the engine's state is kept exactly, and nothing is seeded globally.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from merge_service.checkpoints import Checkpoint, admit, check_finite
from merge_service.errors import UserError
from workers.data.batches import Batches
from workers.jobs import EngineSpec, TrainJob
from workers.models.base import check_temperature
from workers.models.model import load, preprocess_cfg, save, tokenizer
from workers.models.weights import lengths
from workers.training.checkpoints import Checkpoints, Progress
from workers.training.engines.make import make_engine
from workers.training.engines.protocol import Engine
from workers.training.recipe import Recipe

POINTS = ("train.start", "train.after_step", "train.after_ckpt", "train.before_commit")
CURVE = 200  # points of a reported loss curve, at most
PATIENCE = 40  # steps in a row that fp16 may skip: enough to bring its loss scale down from 2^16 to 2^-24

Hooks = Mapping[str, Callable[[int], None]]


class ExpertError(UserError):
    """An expert cannot be trained as asked; the message names the task, t, and the step where there is one."""


def train_expert(job: TrainJob, rank: int = 0, world: int = 1, hooks: Hooks | None = None) -> dict[str, Any]:
    """Train one expert; collective over `world` ranks, each a process that has joined the group (`engine.join_group`).

    Rank 0 leaves the weights directory in `job.out`. Every rank returns {"steps", "samples", "seconds",
    "samples_per_second", "loss": [[step, mean loss since the last point], ...] (at most 200 points), "lr": [first,
    highest, last], "grad_norm": the same before clipping, "task_vector_norm": L2 norm of expert - base over float tensors
    in fp64, "drift": that of expert - initial weights, "relative_drift": over the norm of these, "resumed_from": step or None};
    these three are None on other ranks. `hooks` maps a name of `POINTS` to a function called there with the number of
    steps done. Raises ExpertError, or a CheckpointError when initial weights or result do not fit the base.
    """
    recipe = Recipe.model_validate(job.recipe)
    _check(job, recipe, world)
    with _numerics(job.engine):
        init = Path(job.init)
        model = load(init, job.engine.device)
        if getattr(model, "logit_bias", None) is None:
            who = f"task {job.task!r} (t={job.t}): the model in {init}"
            check_temperature(float(model.get_parameter("logit_scale").detach().reshape(-1)[0]), who)
        batches = Batches(job, tokenizer(init), preprocess_cfg(init), rank, world)
        engine = make_engine(model, recipe, job.steps, job.engine, job.seed, rank)
        with closing(engine):
            result = _Loop(job, recipe, rank, hooks or {}).run(engine, batches)
            state = engine.weights()
        if rank == 0:
            result |= _hand_over(job, state)
        _fire(hooks or {}, "train.before_commit", job.steps)
    return result


class _Loop:
    """The steps of one expert, with what surrounds a step: checkpoints, progress, the loss curve, refusal of NaN."""

    def __init__(self, job: TrainJob, recipe: Recipe, rank: int, hooks: Hooks) -> None:
        self._job, self._recipe, self._rank, self._hooks = job, recipe, rank, hooks
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

    def run(self, engine: Engine, batches: Batches) -> dict[str, Any]:
        start = self._resume(engine)
        _fire(self._hooks, "train.start", start or 0)
        started = time.perf_counter()
        before = self._seconds
        steps, every = self._job.steps, self._job.checkpoint_every
        for step, (images, tokens) in _prefetched(batches, start or 0, steps, self._job.engine.device):
            report = engine.step(images, tokens)
            self._seconds = before + time.perf_counter() - started
            self._note(step, report)
            _fire(self._hooks, "train.after_step", step + 1)
            if every and (step + 1) % every == 0 and step + 1 < steps:
                self._checkpoint(engine, step + 1)
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
            "resumed_from": start,
        }

    def _note(self, step: int, report: dict[str, float]) -> None:
        loss, norm = report["loss"], report["grad_norm"]
        self._skipped = 0 if math.isfinite(norm) else self._skipped + 1
        if not math.isfinite(loss) or self._skipped > (PATIENCE if self._recipe.precision == "fp16" else 0):
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
            raise ExpertError(
                f"task {self._job.task!r} (t={self._job.t}): {what} at step {step + 1} of {self._job.steps}, lr "
                f"{report['lr']:.3g}. Lower recipe.lr, train in fp32, or look at the data of this task"
            )
        self._losses.append(loss)
        self._rates.append(report["lr"])
        self._norms += [norm] if math.isfinite(norm) else []
        if (step + 1) % self._stride == 0 or step + 1 == self._job.steps:
            self._curve.append([step + 1, math.fsum(self._losses) / len(self._losses)])
            self._losses.clear()
        if self._rank == 0:
            self._progress.tell(step + 1, (step + 1) * self._recipe.batch_size, loss)

    def _resume(self, engine: Engine) -> int | None:
        """Steps already done according to the newest complete checkpoint; rank 0 judges, the others follow."""
        if self._rank == 0:
            self._checkpoints.claim()
        newest = self._checkpoints.newest() if self._rank == 0 else 0
        step = _from_rank_zero(newest, self._job.engine)
        if step == 0:
            return None
        directory, loop = self._checkpoints.judged(step)
        engine.load(directory)
        self._curve, self._losses = loop["curve"], loop["losses"]
        self._rates, self._norms, self._seconds = loop["rates"], loop.get("norms", []), loop["seconds"]
        return step

    def _checkpoint(self, engine: Engine, step: int) -> None:
        if self._rank == 0:
            self._checkpoints.stage(step)
        _barrier(self._job.engine)
        engine.save(self._checkpoints.staged(step))
        _barrier(self._job.engine)
        if self._rank == 0:
            loop = {
                "curve": self._curve,
                "losses": self._losses,
                "rates": _ends(self._rates),
                "norms": _ends(self._norms),
                "seconds": self._seconds,
            }
            self._checkpoints.complete(step, loop)
        _barrier(self._job.engine)
        _fire(self._hooks, "train.after_ckpt", step)


def _ends(values: list[float]) -> list[float]:
    """[first, highest, last]; nothing of nothing, as where fp16 skipped every step."""
    return [values[0], max(values), values[-1]] if values else []


def _check(job: TrainJob, recipe: Recipe, world: int) -> None:
    assert world == job.engine.world, f"{world} ranks run a job made for {job.engine.world}"
    where = f"task {job.task!r} (t={job.t})"
    if job.steps < 1:
        raise ExpertError(f"{where}: the budget gives {job.steps} steps; it must give at least one")
    if recipe.batch_size % world:
        raise ExpertError(
            f"{where}: recipe.batch_size {recipe.batch_size} cannot be shared evenly by {world} workers; "
            f"{recipe.batch_size - recipe.batch_size % world} or {recipe.batch_size + world - recipe.batch_size % world} can"
        )


def _hand_over(job: TrainJob, state: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Write the expert, check the written file against the base, and measure how far it is from the base and from its start."""
    out, base = Path(job.out), Path(job.base)
    save(state, Path(job.init), out)
    who = f"the expert of task {job.task!r} (t={job.t})"
    with Checkpoint.open(base) as reference, Checkpoint.open(out) as expert:
        admit(reference, expert, who)
        check_finite(expert, who)
    norm, _ = lengths(base, state)
    drift, start = lengths(Path(job.init), state)
    return {"task_vector_norm": norm, "drift": drift, "relative_drift": drift / start if start else 0.0}


def _prefetched(
    batches: Batches, start: int, steps: int, device: str
) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor]]]:
    """(step, batch) from `start`; with a GPU the next batch is made while this one is used, on a CPU it would only
    compete for the cores."""
    if device == "cpu":
        yield from ((step, batches.batch(step)) for step in range(start, steps))
        return
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(batches.batch, start) if start < steps else None
        for step in range(start, steps):
            assert coming is not None
            images, tokens = coming.result()
            coming = pool.submit(batches.batch, step + 1) if step + 1 < steps else None
            yield step, (images.to(device, non_blocking=True), tokens.to(device, non_blocking=True))


@contextmanager
def _numerics(engine: EngineSpec) -> Iterator[None]:
    """Fix what decides the bits: the number of threads, and on a GPU the deterministic kernels.

    CPU kernels are deterministic for a fixed number of threads, so nothing is switched there. On a GPU a kernel without a
    deterministic form only warns: bit-identity is then promised per checkpoint, not across runs.
    """
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(engine.threads)
    if engine.device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
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
