"""The plain engine takes the step that the recipe describes, and continues from a checkpoint with the same bits."""

import datetime
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip import ClipLoss

from tests.servers import free_port
from tests.workers.model_helpers import Toys, apart
from workers.feed.device import Host
from workers.jobs import EngineSpec
from workers.models.base import MAX_LOGIT_SCALE
from workers.models.model import load
from workers.training.engines.arithmetic import LossScale, adamw, clip, learning_rate
from workers.training.engines.groups import _meeting_point, join_alone, join_group
from workers.training.engines.make import make_engine
from workers.training.engines.torch_engine import TorchEngine
from workers.training.objective import TwoTowers
from workers.training.recipe import Recipe

STEPS = 10


def recipe(**changes: Any) -> Recipe:
    return Recipe(**{"lr": 1e-3, "batch_size": 8, "precision": "fp32", **changes})


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight pairs, whose captions repeat."""
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    words = torch.randint(1, 400, (4, 8), generator=generator)
    words[:, -1] = 49407
    return images, words[[0, 1, 0, 2, 3, 1, 0, 2]]


def engine(toys: Toys, **changes: Any) -> TorchEngine:
    return TorchEngine(load(toys.base), recipe(**changes), STEPS, EngineSpec(), seed=5)


def test_learning_rate_warms_up_then_follows_a_cosine() -> None:
    plan = recipe(lr=2.0, warmup=0.1, min_lr_ratio=0.01)
    rates = [learning_rate(step, 100, plan) for step in range(100)]
    assert rates[:3] == pytest.approx([0.2, 0.4, 0.6]) and rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(0.02 + 1.98 / 2) and rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.02 < rates[-1] < 0.021
    assert learning_rate(0, 1, plan) == 2.0, "a single step has no room to warm up"


def test_loss_scale_halves_on_overflow_and_doubles_after_two_thousand_good_steps() -> None:
    scale, good, bad = LossScale(True, Host.place), torch.tensor(1.0), torch.tensor(math.nan)
    assert [scale.update(norm).item() for norm in (good, bad)] == [0, 1]
    assert scale.numbers.tolist() == [32768, 0]
    for _ in range(1999):
        scale.update(good)
    assert scale.numbers.tolist() == [32768, 1999]
    scale.update(good)
    assert scale.numbers.tolist() == [65536, 0]
    assert LossScale(False, Host.place).update(bad) is None


def test_step_is_what_a_plain_loop_over_open_clip_does(toys: Toys) -> None:
    ours, plain = engine(toys, clip=0.5), load(toys.base).train()
    optimizer = adamw(list(plain.parameters()), recipe())
    for number in range(3):
        images, tokens = batch(number)
        optimizer.param_groups[0]["lr"] = learning_rate(number, STEPS, recipe())
        optimizer.zero_grad()
        loss = ClipLoss()(*plain(images, tokens))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        report = ours.step(images, tokens)
        assert report.loss == pytest.approx(float(loss.detach()), rel=1e-5)
        assert report.grad_norm == pytest.approx(float(norm), rel=1e-4) and norm > 0.5
    assert apart(ours.weights(), plain.state_dict(), load(toys.base).state_dict()) < 1e-3


def test_equal_captions_encoded_once_change_nothing_but_rounding(toys: Toys) -> None:
    model, (images, tokens) = load(toys.base).train(), batch(0)
    distinct, places = torch.unique(tokens, dim=0, return_inverse=True)
    gradients = []
    for texts in ((distinct, places), (tokens,)):
        features = TwoTowers(model, "fp32")(images, *texts)
        ClipLoss()(*features[:3]).backward()
        gradients.append((features.text.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
        model.zero_grad()
    (one, shared), (other, each) = gradients
    assert torch.allclose(one, other, atol=1e-6)
    assert all(torch.allclose(shared[name], each[name], atol=1e-5) for name in each)


def test_temperature_stays_within_a_hundred(toys: Toys) -> None:
    model = load(toys.base)
    with torch.no_grad():
        model.logit_scale.fill_(MAX_LOGIT_SCALE + 1)
    one = TorchEngine(model, recipe(), STEPS, EngineSpec(), seed=5)
    one.step(*batch(0))
    assert float(one.weights()["logit_scale"]) == pytest.approx(math.log(100))


@pytest.mark.parametrize(("which", "frozen"), [("image", "text"), ("text", "image")])
def test_frozen_tower_does_not_move_a_bit(toys: Toys, which: str, frozen: str) -> None:
    one = engine(toys, trainable=which)
    before = {name: tensor.clone() for name, tensor in one.weights().items()}
    for number in range(3):
        one.step(*batch(number))
    for name, tensor in one.weights().items():
        is_frozen = (frozen == "image") == name.startswith("visual.")
        assert torch.equal(tensor, before[name]) == is_frozen, name
    assert len(one._optimizer.param_groups[0]["params"]) == sum(
        (frozen == "image") != name.startswith("visual.") for name in before
    )


def test_overflow_in_half_precision_skips_the_step_and_halves_the_scale(toys: Toys) -> None:
    one = engine(toys, precision="fp16")
    before = {name: tensor.clone() for name, tensor in one.weights().items()}
    one._scale.numbers = torch.tensor([2.0**40, 7])
    report = one.step(*batch(0))
    assert not math.isfinite(report.grad_norm) and math.isfinite(report.loss)
    assert one._scale.numbers.tolist() == [2.0**39, 0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.weights().items())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precisions_train_alike(toys: Toys, precision: str) -> None:
    one = engine(toys, precision=precision)
    losses = [one.step(*batch(0)).loss for _ in range(4)]
    assert losses[0] == pytest.approx(3.69, abs=0.05) and losses[-1] < losses[0]
    assert all(tensor.dtype == torch.float32 for tensor in one.weights().values())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_engine_loaded_from_a_checkpoint_goes_on_with_the_same_bits(
    toys: Toys, tmp_path: Path, precision: str
) -> None:
    whole, first, second = (engine(toys, precision=precision, trainable="image") for _ in range(3))
    for number in range(4):
        whole.step(*batch(number))
    for number in range(2):
        first.step(*batch(number))
    write = first.save(tmp_path)
    first.step(*batch(2))
    write()
    second.load(tmp_path)
    reports = [second.step(*batch(number)) for number in range(2, 4)]
    assert reports[-1].lr == learning_rate(3, STEPS, recipe())
    assert all(torch.equal(second.weights()[name], tensor) for name, tensor in whole.weights().items())


def test_make_engine_gives_the_plain_engine_without_importing_deepspeed(toys: Toys) -> None:
    assert isinstance(make_engine(load(toys.base), recipe(), 1, EngineSpec(), 0), TorchEngine)


def test_group_of_one_is_joined_once_and_another_place_in_it_is_our_own_mistake() -> None:
    join_alone("cpu")
    join_alone("cpu")
    assert torch.distributed.get_world_size() == 1
    with pytest.raises(AssertionError, match="rank 0 of 1 already"):
        join_group(1, 2, "127.0.0.1", 1, "cpu")


@pytest.mark.parametrize("bound", [1e-7, 0.5, 2.7, 100.0, 0.0])
@pytest.mark.parametrize("look", [True, False])
def test_clipping_is_torchs_to_the_bit(bound: float, look: bool) -> None:
    draws = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    ours, theirs = ([torch.nn.Parameter(torch.zeros(50)) for _ in range(4)] for _ in range(2))
    for one, other, draw in zip(ours, theirs, draws, strict=False):  # the fourth has no gradient
        one.grad, other.grad = draw.clone() / 5, draw.clone() / 5
    expected = torch.nn.utils.clip_grad_norm_(theirs, bound or math.inf)
    assert clip(ours, bound, look) == expected
    for one, other in zip(ours[:3], theirs[:3], strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.fault("F27")
def test_ranks_meet_on_the_given_address_and_no_other() -> None:
    port = free_port()
    store = _meeting_point("127.0.0.1", port, 0, 1, datetime.timedelta(seconds=20))
    store.set("key", "value")
    listening = [
        line.split()[1]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
    ]
    assert listening == [f"0100007F:{port:04X}"]
