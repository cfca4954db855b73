"""A batch in parts gives the gradients, and the expert, of the whole batch at once, with every engine."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_service.errors import UserError
from tests.workers.model_helpers import MODEL_CFG, Toys, apart, sha256, write_config
from tests.workers.training.test_batch_norm import RESNET
from tests.workers.training.test_engine import batch, engine
from tests.workers.training.test_engine_deepspeed import CLOSE, on_deepspeed
from tests.workers.training.test_expert import Stop, stop_at
from workers.jobs import EngineSpec
from workers.models.model import export_base, load
from workers.training.engines.torch_engine import TorchEngine
from workers.training.expert import train_expert
from workers.training.objective import TwoTowers
from workers.training.recipe import Recipe


def gradients(one: TorchEngine, texts: str) -> tuple[dict[str, torch.Tensor], float]:
    images, tokens = batch(0)
    places = None
    if texts == "distinct":
        tokens, places = torch.unique(tokens, dim=0, return_inverse=True)
    loss = one._backward(images, tokens, places)
    return {name: p.grad for name, p in one._trained.items() if p.grad is not None}, float(loss)


@pytest.mark.parametrize("texts", ["distinct", "one a picture"])
@pytest.mark.parametrize("parts", [2, 8])
@pytest.mark.parametrize("trainable", ["all", "image"])
def test_gradients_of_a_batch_in_parts_are_those_of_the_whole(
    toys: Toys, parts: int, texts: str, trainable: str
) -> None:
    whole, loss = gradients(engine(toys, trainable=trainable), texts)
    found, same = gradients(engine(toys, trainable=trainable, accumulate=parts), texts)
    assert same == pytest.approx(loss, rel=1e-6) and found.keys() == whole.keys()
    for name, gradient in whole.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name
    if trainable == "all":
        assert float(whole["logit_scale"].abs()) > 1e-3, "it would not show whether it counts more than once"


def test_bias_and_temperature_of_the_sigmoid_loss_count_once(tmp_path: Path) -> None:
    file = write_config(tmp_path / "config", init_logit_bias=-10)
    export_base(str(file), None, tmp_path / "siglip", seed=1)
    whole, found = (
        gradients(TorchEngine(load(tmp_path / "siglip"), one, 1, EngineSpec(), 5), "distinct")[0]
        for one in (Recipe(batch_size=8, precision="fp32", accumulate=parts) for parts in (1, 4))
    )
    for name in ("logit_bias", "logit_scale"):
        assert found[name] == pytest.approx(float(whole[name]), rel=1e-4) and float(whole[name]) != 0


def test_dropout_draws_for_a_part_what_it_drew_before(toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    encode = TwoTowers._encode

    def noted(towers: TwoTowers, *part: torch.Tensor) -> Any:
        seen.append(torch.rand(3))
        return encode(towers, *part)

    monkeypatch.setattr(TwoTowers, "_encode", noted)
    engine(toys, accumulate=4).step(*batch(0))
    first, second = seen[:4], seen[4:]
    assert len(second) == 4 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({tuple(one.tolist()) for one in first}) == 4


@pytest.mark.fault("F34")
@pytest.mark.parametrize(
    ("recipe", "close"), [({}, CLOSE), ({"precision": "fp16"}, 0.1), ({"trainable": "text"}, CLOSE)], ids=str
)
def test_expert_in_parts_is_that_of_the_whole_batch_with_every_engine(
    toys: Toys, tmp_path: Path, recipe: dict[str, Any], close: float
) -> None:
    whole = toys.job(tmp_path / "whole", steps=4, clip=0.5, replay=True, **recipe)
    parts = toys.job(tmp_path / "parts", steps=4, clip=0.5, replay=True, accumulate=4, **recipe)
    losses = train_expert(whole)["loss"]
    assert train_expert(parts)["loss"][-1][1] == pytest.approx(losses[-1][1], rel=1e-3)
    base, ideal = load(toys.base).state_dict(), load(Path(whole.out)).state_dict()
    assert 0 < apart(load(Path(parts.out)).state_dict(), ideal, base) < close
    for stage in (0, 2, 3):
        spread = replace(
            on_deepspeed(parts, stage), out=f"{parts.out}-{stage}", scratch=f"{parts.scratch}-{stage}"
        )
        Path(spread.out).mkdir()
        train_expert(spread)
        assert apart(load(Path(spread.out)).state_dict(), ideal, base) < close
        assert stage or sha256(spread.out) == sha256(parts.out), "stage 0 is plain torch to the bit"


@pytest.mark.fault("F1")
@pytest.mark.parametrize("stage", [None, 1])
def test_expert_in_parts_stopped_midway_ends_in_the_same_bytes(
    toys: Toys, tmp_path: Path, stage: int | None
) -> None:
    recipe: dict[str, Any] = {"accumulate": 2, "ema": 0.5, "precision": "fp16", "patch_dropout": 0.5}
    jobs = [toys.job(tmp_path / name, steps=4, every=2, **recipe) for name in ("whole", "stopped")]
    whole, stopped = jobs if stage is None else (on_deepspeed(job, stage) for job in jobs)
    train_expert(whole)
    with pytest.raises(Stop):
        train_expert(stopped, hooks={"train.after_step": stop_at(3)})
    assert train_expert(stopped)["resumed_from"] == 2
    assert sha256(stopped.out) == sha256(whole.out)


def test_network_that_normalises_over_the_batch_is_refused_in_parts(toys: Toys, tmp_path: Path) -> None:
    file = write_config(tmp_path / "config", **(MODEL_CFG | {"vision_cfg": RESNET}))
    export_base(str(file), None, tmp_path / "resnet", seed=1)
    job = toys.job(tmp_path / "job", steps=1, accumulate=2)
    asked = replace(job, init=str(tmp_path / "resnet"), base=str(tmp_path / "resnet"))
    with pytest.raises(UserError, match=r"task 'toy' \(t=3\): the model in .* normalises over the batch"):
        train_expert(asked)
    train_expert(replace(asked, recipe={**asked.recipe, "trainable": "text"}))
