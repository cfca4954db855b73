"""The thin Ray edge of training and evaluation, in one actor: receive a job, call the plain function, commit the result.

Invariant: an actor holds caches only. Whatever it returns is already in the store, and every method may run twice
with the same job: the second commit of the same bytes is a no-op.
"""

import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import ray

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.engine import keep_thresholds
from merge_service.faults import point
from workers.jobs import EvaluateJob, LearnJob, MeasureJob, TrainJob


class Store(Protocol):
    """The part of the store that an actor uses; the driver passes it with a job."""

    def make(
        self,
        step: Any,
        work: Callable[[Path], Mapping[str, Any]],
        *,
        held: Literal["files", "adapter"] = "files",
    ) -> Any:
        """Check the inputs of a step, let `work` write the output into a directory, and commit it; returns the record. Of an expert with
        an adapter only that stays.
        """

    def open_inputs(self, step: Any) -> None:
        """Check a step's inputs."""


class Worker:
    """One rank of a group that trains experts; a group of one rank scores checkpoints as well.

    A worker is kept for many steps: torch is imported once, and decoded data, tokens and mapped base weights stay in its memory.
    """

    def __init__(self, rank: int, world: int, threads: int, device: str, gpus: float = 0) -> None:
        import torch

        import workers.scoring.evaluate
        import workers.training.expert  # noqa: F401  (takes seconds, before the first step)
        from workers.feed.placement import settle

        torch.set_num_threads(threads)
        if device == "cuda":
            settle(gpus)
        self.rank, self.world, self.device = rank, world, device

    def address(self) -> tuple[str, int]:
        """The host of this rank and a port that is free there, for the rendezvous of the group."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return host, probe.getsockname()[1]

    def join(self, place: tuple[str, int]) -> None:
        """Join the process group of the ranks; called once per group."""
        from workers.training.engines.groups import join_group

        join_group(self.rank, self.world, *place, self.device)

    def run(self, job: TrainJob | EvaluateJob | MeasureJob | LearnJob, step: Any, store: Store) -> Any:
        """Execute one step; rank 0 commits it and returns the record, other ranks return None."""
        if isinstance(job, TrainJob):
            return self._train(job, step, store)
        record = store.make(step, lambda stage: _work(job, stage))
        if job.scratch:
            shutil.rmtree(job.scratch, ignore_errors=True)
        return record

    def _train(self, job: TrainJob, step: Any, store: Store) -> Any:
        from workers.training.expert import POINTS, train_expert

        hooks = {name: partial(_pass, name) for name in POINTS}
        if self.rank != 0:
            store.open_inputs(step)
            train_expert(job, rank=self.rank, world=self.world, hooks=hooks)
            return None
        record = store.make(
            step,
            lambda stage: train_expert(replace(job, out=str(stage)), rank=0, world=self.world, hooks=hooks),
            held="adapter" if job.recipe.get("adapter") else "files",
        )
        for technique, params in job.asked_limits:
            keep_thresholds(
                technique, params, job.base, record.path, job.limits,
                sha256=record.sha256(WEIGHTS_FILE), threads=job.engine.threads,
            )  # fmt: skip
        shutil.rmtree(job.scratch, ignore_errors=True)
        return record


def _work(job: EvaluateJob | MeasureJob | LearnJob, stage: Path) -> Mapping[str, Any]:
    """The work of one process, which writes its files into `stage`; its result."""
    if isinstance(job, MeasureJob):
        from workers.evidence.tasks import measure_models

        point("measure.start")
        return measure_models(replace(job, out=str(stage)))
    if isinstance(job, LearnJob):
        from workers.learning.sources import learn_merge

        point("learn.start")
        return learn_merge(replace(job, out=str(stage)))
    from workers.scoring.evaluate import evaluate

    point("evaluate.start")
    return evaluate(job)


def _pass(name: str, _: int) -> None:
    point(name)


def gather(members: list[Any]) -> list[Any]:
    """Start the rendezvous of a new group; returns the references that must succeed before the first step."""
    if len(members) == 1:
        return []
    place = members[0].address.remote()
    return [member.join.remote(place) for member in members]
