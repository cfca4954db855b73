"""How a network is run while it is trained: what changes bits, what does not, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import workers.training.preparation as preparation
from merge_service.errors import UserError
from tests.workers.model_helpers import MODEL_CFG, Toys, sha256
from tests.workers.training.test_batch_norm import RESNET
from tests.workers.training.test_engine import batch
from tests.workers.training.test_engine_deepspeed import on_deepspeed
from tests.workers.training.test_expert import Stop, stop_at
from workers.jobs import TrainJob
from workers.models.model import load
from workers.training.budget import check_recipe
from workers.training.engines.torch_engine import TorchEngine
from workers.training.expert import train_expert
from workers.training.preparation import prepare
from workers.training.recipe import Recipe


def trained(job: TrainJob, **changes: Any) -> str:
    """The sha256 of an expert."""
    Path(job.out).mkdir(parents=True, exist_ok=True)
    train_expert(replace(job, **changes))
    return sha256(job.out)


@pytest.mark.parametrize(
    "recipe",
    [{}, {"precision": "bf16"}, {"precision": "fp16", "patch_dropout": 0.5}, {"trainable": "image"}],
    ids=str,
)
def test_activation_checkpointing_changes_no_bit(toys: Toys, tmp_path: Path, recipe: dict[str, Any]) -> None:
    for stage in (None, 0, 3):
        jobs = [toys.job(tmp_path / f"{stage} {name}", steps=3, **recipe) for name in ("kept", "again")]
        kept, again = jobs if stage is None else (on_deepspeed(job, stage) for job in jobs)
        assert trained(kept) == trained(again, activation_checkpointing=True)


def test_activation_checkpointing_keeps_less_for_the_backward_pass(toys: Toys) -> None:
    def kept(checkpointing: bool) -> int:
        model = load(toys.base)
        prepare(model, Recipe(), checkpointing, "the toy")
        sizes: list[int] = []
        with saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            model(*batch(0))
        return sum(sizes)

    assert kept(True) < kept(False) / 2


@pytest.mark.parametrize("key", ["patch_dropout", "channels_last"])
def test_what_bears_on_bits_gives_another_expert_and_the_same_one_again(
    toys: Toys, tmp_path: Path, key: str
) -> None:
    value = 0.5 if key == "patch_dropout" else True
    plain = toys.job(tmp_path / "plain", steps=4, every=2, precision="fp16")
    one, other = (
        toys.job(tmp_path / name, steps=4, every=2, precision="fp16", **{key: value})
        for name in ("one", "other")
    )
    with pytest.raises(Stop):
        train_expert(other, hooks={"train.after_step": stop_at(3)})
    assert trained(one) == trained(other)
    if key == "patch_dropout":  # the kernels of some processors give both layouts the same bits
        assert trained(one) != trained(plain)


def test_patch_dropout_leaves_out_a_share_of_the_patches_in_training_only(toys: Toys) -> None:
    model: Any = load(toys.base)
    prepare(model, Recipe(patch_dropout=0.5), False, "the toy")
    lengths: list[int] = []
    model.visual.transformer.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    model.encode_image(batch(0)[0])
    model.eval().encode_image(batch(0)[0])
    assert lengths == [1 + 8, 1 + 16], "the class token stays, and half of the 16 patches"
    prepare(model, Recipe(patch_dropout=0.0), False, "the toy")
    model.encode_image(batch(0)[0])
    assert lengths[-1] == 1 + 16


def test_towers_see_pictures_laid_out_pixel_by_pixel(
    toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    step = TorchEngine.step

    def noted(engine: TorchEngine, images: torch.Tensor, *more: torch.Tensor) -> Any:
        seen.append(images.is_contiguous(memory_format=torch.channels_last))
        return step(engine, images, *more)

    monkeypatch.setattr(TorchEngine, "step", noted)
    trained(toys.job(tmp_path, steps=2, channels_last=True))
    assert seen == [True, True]


def test_compiled_tower_is_compiled_once_and_keeps_the_names_of_its_weights(
    toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands for the compiler here runs the graph as it is, so that bytes stay; inductor's own differ by rounding."""
    graphs: list[Any] = []

    def as_it_is(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(preparation, "BACKEND", as_it_is)
    plain = trained(toys.job(tmp_path / "plain", steps=3, replay=True))
    for number, change in enumerate(({}, {"accumulate": 2})):
        before = len(graphs)
        job = toys.job(tmp_path / str(number), steps=3, replay=True, compile=True, **change)
        compiled = trained(job)
        assert len(graphs) > before and (compiled == plain) == (not change)
        assert len(graphs) == before + 1 + len(change), "one graph for the tower, one more without gradient"
    assert load(Path(job.out)).state_dict().keys() == load(toys.base).state_dict().keys()


def test_tf32_is_switched_on_for_the_expert_alone(
    toys: Toys, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    hooks = {"train.after_step": lambda _: seen.append(torch.backends.cuda.matmul.allow_tf32)}
    for tf32 in (True, False):
        train_expert(toys.job(out, steps=1, tf32=tf32), hooks=hooks)
    assert seen == [True, False] and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.fault("F25")
@pytest.mark.parametrize(
    ("vision", "recipe", "checkpointing", "says"),
    [
        (RESNET, {"accumulate": 2}, False, "normalises over the batch.*accumulate must be 1"),
        (RESNET, {"patch_dropout": 0.5}, False, "patch_dropout is for.*a net is a ModifiedResNet"),
        (RESNET, {}, True, "activation_checkpointing: a net has a ModifiedResNet"),
    ],
)
def test_recipe_that_a_network_cannot_follow_is_refused_from_its_configuration(
    vision: dict[str, Any], recipe: dict[str, Any], checkpointing: bool, says: str
) -> None:
    for tower, good in ((vision, False), (MODEL_CFG["vision_cfg"], True)):
        configuration = {"model_cfg": MODEL_CFG | {"vision_cfg": tower}}
        if good:
            check_recipe(configuration, "a net", Recipe(**recipe), checkpointing)
            continue
        with pytest.raises(UserError, match=says):
            check_recipe(configuration, "a net", Recipe(**recipe), checkpointing)
