"""A process that trains on pools as they are stored is killed in mid-epoch; another one ends in the same bytes."""

import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.workers.fake_cuda import FakeCuda
from tests.workers.model_helpers import Toys, sha256
from workers.data.encoded.pictures import Pictures
from workers.feed import device as devices
from workers.jobs import EngineSpec, TrainJob
from workers.training.expert import train_expert


def train(job: TrainJob, step: int, reading: int) -> None:
    """Train, and be killed after `step` steps; or while the picture `reading` is decoded, for which several threads may be at work."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    devices.DEVICES["cuda"] = FakeCuda
    original, seen = Pictures._original, []

    def noted(pictures: Pictures, row: int) -> Any:
        seen.append(row)
        if len(seen) == reading:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(pictures, row)

    def kill(done: int) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Pictures._original = noted  # type: ignore[method-assign]
    train_expert(job, hooks={"train.after_step": kill})


def run(job: TrainJob, step: int = 0, reading: int = 0) -> int | None:
    process = multiprocessing.get_context("spawn").Process(target=train, args=(job, step, reading))
    process.start()
    process.join(240)
    return process.exitcode


def job_in(toys: Toys, out: Path, device: Any) -> TrainJob:
    """80 samples of each split, 16 pairs a batch of three sources."""
    asked = toys.job(out, steps=8, every=2, replay=True)
    stored = {
        part: tuple(replace(source, reading="encoded") for source in getattr(asked, part))
        for part in ("update", "buffer", "pretraining")
    }
    return replace(asked, **stored, engine=EngineSpec(device=device), loaders=3)


@pytest.fixture(scope="module")
def undisturbed(toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> str:
    job = job_in(toys, tmp_path_factory.mktemp("undisturbed"), "cpu")
    train_expert(job)
    return sha256(job.out)


@pytest.mark.slow
@pytest.mark.fault("F1")
@pytest.mark.parametrize(
    ("device", "step", "reading"), [("cpu", 5, 0), ("cuda", 0, 16 * 5)], ids=["step", "loader"]
)
def test_process_killed_in_mid_epoch_of_a_stored_pool_is_replaced_and_nothing_differs(
    toys: Toys, out: Path, undisturbed: str, device: Any, step: int, reading: int
) -> None:
    job = job_in(toys, out, device)
    assert run(job, step, reading) == -signal.SIGKILL
    assert not list(Path(job.out).iterdir())
    assert run(job) == 0
    assert sha256(job.out) == undisturbed
