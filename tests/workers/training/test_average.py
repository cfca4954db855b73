"""The average of weights over the steps of a task: what it is, and that nothing else changes because of it."""

from pathlib import Path

import pytest
import torch

from tests.workers.model_helpers import Toys, apart, sha256
from tests.workers.training.test_engine import batch, engine
from tests.workers.training.test_engine_deepspeed import on_deepspeed
from workers.models.model import load
from workers.training.expert import train_expert

DECAY = 0.75


@pytest.mark.parametrize("trainable", ["all", "image"])
def test_delivered_weights_are_the_average_and_steps_know_nothing_of_it(toys: Toys, trainable: str) -> None:
    plain, averaged = engine(toys, trainable=trainable), engine(toys, trainable=trainable, ema=DECAY)
    expected = {name: tensor.double() for name, tensor in plain.weights().items()}
    for number in range(5):
        one, other = plain.step(*batch(number)), averaged.step(*batch(number))
        assert torch.equal(one.numbers, other.numbers)
        expected = {n: DECAY * expected[n] + (1 - DECAY) * t.double() for n, t in plain.weights().items()}
    found = averaged.weights()
    assert all(torch.allclose(found[name].double(), tensor, atol=1e-7) for name, tensor in expected.items())
    moved = [name for name in found if not torch.equal(found[name], plain.weights()[name])]
    assert {name.startswith("visual.") for name in moved} == (
        {True} if trainable == "image" else {True, False}
    )


def test_step_that_is_skipped_does_not_move_the_average(toys: Toys) -> None:
    one = engine(toys, precision="fp16", ema=DECAY)
    one.step(*batch(0))
    before = {name: tensor.clone() for name, tensor in one.weights().items()}
    one._scale.numbers = torch.tensor([2.0**40, 7])
    one.step(*batch(1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.weights().items())
    one._scale.numbers = torch.tensor([2.0**10, 7])
    one.step(*batch(2))
    assert not torch.equal(one.weights()["logit_scale"], before["logit_scale"])


@pytest.mark.fault("F34")
def test_average_with_deepspeed_is_that_of_plain_torch(toys: Toys, tmp_path: Path) -> None:
    jobs = [toys.job(tmp_path / name, steps=4, ema=DECAY) for name in ("torch", "0", "2")]
    plain = train_expert(jobs[0])
    for job in jobs[1:]:
        other = train_expert(on_deepspeed(job, int(Path(job.out).parent.name)))
        assert other["loss"][-1][1] == pytest.approx(plain["loss"][-1][1], rel=1e-4)
    assert sha256(jobs[0].out) == sha256(jobs[1].out)
    theirs, ours, base = (load(Path(place)).state_dict() for place in (jobs[0].out, jobs[2].out, toys.base))
    assert apart(ours, theirs, base) < 5e-3
    last = toys.job(tmp_path / "last", steps=4)
    assert train_expert(last)["drift"] > plain["drift"] > 0
