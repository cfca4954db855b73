"""On a simulated GPU no step waits for a number, and results equal those of a CPU."""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import workers.training.expert as training
from tests.workers.fake_cuda import FakeCuda, Waited, no_waiting
from tests.workers.model_helpers import Toys, sha256
from tests.workers.training.test_expert import Fake, Stop, stop_at, with_fake
from workers.feed import device as devices
from workers.jobs import EngineSpec, TrainJob
from workers.training.engines.torch_engine import TorchEngine
from workers.training.expert import ExpertError, train_expert


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """In the place of every GPU; whoever waits in the loop of an expert fails."""
    fake, run = FakeCuda(), training._Loop.run
    monkeypatch.setitem(devices.DEVICES, "cuda", lambda: fake)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def guarded(loop: training._Loop, *arguments: Any) -> Any:
        with no_waiting(fake) if loop._job.engine.device == "cuda" else nullcontext():
            return run(loop, *arguments)

    monkeypatch.setattr(training._Loop, "run", guarded)
    return fake


def on_gpu(job: TrainJob) -> TrainJob:
    return replace(job, engine=EngineSpec(device="cuda"), loaders=2)


@pytest.mark.parametrize(
    "recipe",
    [
        {"clip": 0.5},
        {"precision": "fp16"},
        {"precision": "bf16"},
        {"precision": "fp16", "accumulate": 4, "ema": 0.5},
        {"patch_dropout": 0.5, "channels_last": True},
    ],
    ids=str,
)
def test_expert_of_a_gpu_that_never_waits_is_that_of_the_cpu(
    toys: Toys, tmp_path: Path, gpu: FakeCuda, recipe: dict[str, Any]
) -> None:
    here, there = (
        toys.job(tmp_path / name, steps=11, every=5, replay=True, **recipe) for name in ("cpu", "gpu")
    )
    one, other = train_expert(here), train_expert(on_gpu(there))
    assert sha256(here.out) == sha256(there.out)
    assert [one[key] for key in ("loss", "grad_norm", "lr")] == [
        other[key] for key in ("loss", "grad_norm", "lr")
    ]


def test_steps_that_overflow_are_skipped_without_a_look_at_them(
    toys: Toys, tmp_path: Path, gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = training.make_engine

    def high(*arguments: Any) -> Any:
        engine = made(*arguments)
        engine._scale.numbers = torch.tensor([2.0**44, 0.0])
        return engine

    monkeypatch.setattr(training, "make_engine", high)
    here, there = (toys.job(tmp_path / name, steps=40, precision="fp16") for name in ("cpu", "gpu"))
    one, other = train_expert(here), train_expert(on_gpu(there))
    assert sha256(here.out) == sha256(there.out) and one["grad_norm"] == other["grad_norm"]
    assert math.isfinite(one["grad_norm"][1])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_expert_stopped_on_a_gpu_goes_on_to_the_same_bytes(
    toys: Toys, tmp_path: Path, gpu: FakeCuda, precision: str
) -> None:
    whole, stopped = (on_gpu(toys.job(tmp_path / n, steps=9, every=3, precision=precision)) for n in "ab")
    train_expert(whole)
    with pytest.raises(Stop):
        train_expert(stopped, hooks={"train.after_step": stop_at(8)})
    assert train_expert(stopped)["resumed_from"] == 6
    assert sha256(stopped.out) == sha256(whole.out)


@pytest.mark.fault("F17")
@pytest.mark.parametrize(
    ("bad", "kept"), [(5, "step-000000004"), (8, "step-000000004"), (9, "step-000000008")]
)
def test_loss_that_is_not_finite_is_found_later_and_named_by_its_step(
    toys: Toys, out: Path, gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, bad: int, kept: str
) -> None:
    fake = Fake(lambda step: math.nan if step == bad else 1.0)
    with_fake(monkeypatch, fake)
    with pytest.raises(ExpertError, match=rf"the loss is nan at step {bad} of 60, lr 1e-05"):
        train_expert(on_gpu(toys.job(out, steps=60, every=4)))
    assert fake.done == min(bad + gpu.lag, 4 * -(-bad // 4)), (
        "found late, but before a checkpoint would hold it"
    )
    assert [path.name for path in (out / "scratch" / "checkpoints").iterdir()] == [kept]


def test_loop_reads_the_numbers_of_steps_long_ago(
    toys: Toys, out: Path, gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_hand_over", lambda *_: {})
    with_fake(monkeypatch, Fake(float))
    steps: list[int] = []
    train_expert(
        on_gpu(toys.job(out, steps=20)), hooks={"train.after_step": lambda n: steps.append(len(gpu.log))}
    )
    waits = [at for at, call in enumerate(gpu.log) if call.what == "synchronize"]
    early = [at for at in waits if at < steps[gpu.lag - 1]]
    assert not early and len(waits) == 20
    assert sum(at >= steps[-1] for at in waits) == gpu.lag


@pytest.mark.parametrize("call", ["item", "float", "bool", "cpu", "tolist", "unique"])
def test_loop_that_asks_for_a_number_of_the_device_is_found(
    toys: Toys, out: Path, gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    ask = {
        "item": torch.Tensor.item, "float": float, "bool": bool, "cpu": torch.Tensor.cpu, "tolist": torch.Tensor.tolist,
        "unique": partial(torch.unique, dim=0),
    }[call]  # fmt: skip
    step = TorchEngine.step

    def asking(engine: TorchEngine, *batch: torch.Tensor) -> Any:
        report = step(engine, *batch)
        ask(batch[1] if call == "unique" else report.numbers[0])
        return report

    monkeypatch.setattr(TorchEngine, "step", asking)
    with pytest.raises(Waited):
        train_expert(on_gpu(toys.job(out, steps=2)))
