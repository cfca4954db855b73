"""Experts that are trained as adapters: the network that is trained is the one that is kept, nothing else moves, and bits stay."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from merge_service.checkpoints import (
    ADAPTER_FOLDER,
    WEIGHTS_FILE,
    Checkpoint,
    on_grid,
    open_weights,
    sha256_of,
)
from merge_service.errors import UserError
from pipeline.store.artifact import ADAPTER
from tests.workers.model_helpers import Toys, sha256, write_config
from tests.workers.training.test_batch_norm import RESNET
from tests.workers.training.test_engine import batch
from tests.workers.training.test_expert import Stop, stop_at
from workers.jobs import EngineSpec, TrainJob
from workers.models.model import export_base, load
from workers.training.budget import measure
from workers.training.engines.torch_engine import TorchEngine
from workers.training.expert import train_expert
from workers.training.low_rank import save
from workers.training.preparation import prepare
from workers.training.recipe import Adapter, Recipe

LORA = {"rank": 4}


def adapted(toys: Toys, **recipe: Any) -> torch.nn.Module:
    model = load(toys.base)
    prepare(model, Recipe(adapter=Adapter(**LORA), **recipe), False, "the toy", seed=3)
    return model


def adapter_of(job: TrainJob) -> str:
    return sha256_of(Path(job.out) / ADAPTER_FOLDER)


def test_network_before_the_first_step_is_that_of_its_weights_to_the_bit(toys: Toys) -> None:
    images, tokens = batch(0)
    plain = load(toys.base).train()
    for one, other in zip(adapted(toys)(images, tokens), plain(images, tokens)):
        assert torch.equal(one, other)


def test_what_is_kept_is_what_was_trained_and_nothing_else_moves(toys: Toys, out: Path) -> None:
    recipe = Recipe(lr=1e-2, batch_size=16, precision="fp32", adapter=Adapter(rank=4, alpha=6, rslora=True))
    model = load(toys.base)
    prepare(model, recipe, False, "the toy", seed=3)
    engine = TorchEngine(model, recipe, 3, EngineSpec(), 3)
    for number in range(3):
        engine.step(*batch(number))
    out.mkdir(exist_ok=True)
    save(engine.weights(), recipe.adapter or Adapter(), toys.base, out)
    with Checkpoint.open(toys.base) as base, Checkpoint.open(out / WEIGHTS_FILE) as kept:
        assert [*base.tensors] == [*kept.tensors]
        moved = [name for name in base.tensors if not np.array_equal(base.read(name), kept.read(name))]
        for name in moved:
            module, _, key = name.rpartition(".")
            weight = getattr(model.get_submodule(module), key).detach().numpy().reshape(-1)
            np.testing.assert_allclose(kept.read(name), weight, atol=1e-6)
    ends = {name.split("resblocks.")[-1][2:] for name in moved}
    assert ends == {"attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    with open_weights(out / ADAPTER_FOLDER, toys.base) as read, Checkpoint.open(out / WEIGHTS_FILE) as kept:
        assert all(np.array_equal(read.read(name), kept.read(name)) for name in kept.tensors)
        assert read.metadata.get("tied") == kept.metadata.get("tied")


def test_gradient_of_the_factors_is_that_of_the_weights_times_the_other_factor(toys: Toys) -> None:
    images, tokens = batch(0)
    model, plain = adapted(toys), load(toys.base).train()
    for one in (model, plain):
        features = one(images, tokens)
        (features[0] @ features[1].T).diagonal().sum().backward()
    place = "visual.transformer.resblocks.0.attn"
    factors = model.get_submodule(f"{place}.parametrizations.in_proj_weight.0")
    whole = plain.get_parameter(f"{place}.in_proj_weight").grad
    assert whole is not None and factors.up.grad is not None
    torch.testing.assert_close(factors.up.grad, whole @ factors.down.T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("point", "step", "resumes"), [("train.after_step", 3, 2), ("train.before_commit", 6, 4)]
)
def test_expert_stopped_and_resumed_has_the_same_bytes_as_one_that_was_not(
    toys: Toys, tmp_path: Path, point: str, step: int, resumes: int
) -> None:
    one, other = (toys.job(tmp_path / name, every=2, replay=True, adapter=LORA) for name in ("one", "other"))
    train_expert(one)
    with pytest.raises(Stop):
        train_expert(other, hooks={point: stop_at(step)})
    assert train_expert(other)["resumed_from"] == resumes
    assert (sha256(one.out), adapter_of(one)) == (sha256(other.out), adapter_of(other))
    third = replace(toys.job(tmp_path / "third", replay=True, adapter=LORA), seed=12)
    train_expert(third)
    assert adapter_of(third) != adapter_of(one)


def test_distances_are_those_of_the_written_expert_and_small_files_hold_it(
    toys: Toys, tmp_path: Path
) -> None:
    first, second = (toys.job(tmp_path / name, steps=3, adapter=LORA, lr=1e-2) for name in ("a", "b"))
    one = train_expert(first)
    two = train_expert(replace(second, init=first.out, seed=12))
    assert one["drift"] == one["task_vector_norm"] > 0 and two["drift"] not in (None, two["task_vector_norm"])
    files = {
        file.relative_to(second.out).as_posix(): file.stat().st_size for file in Path(second.out).rglob("*")
    }
    assert files["adapter/adapter_model.safetensors"] < files[WEIGHTS_FILE] / 100
    config = json.loads((Path(second.out) / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"sha256:{sha256(first.out)}"
    assert f"{ADAPTER_FOLDER}/" == ADAPTER


def test_activation_checkpointing_and_parts_of_a_batch_agree_with_the_whole(
    toys: Toys, tmp_path: Path
) -> None:
    plain, again, parts = (
        toys.job(tmp_path / name, steps=3, adapter=LORA, **more)
        for name, more in (("plain", {}), ("again", {}), ("parts", {"accumulate": 2}))
    )
    train_expert(plain)
    train_expert(replace(again, activation_checkpointing=True))
    train_expert(parts)
    assert sha256(plain.out) == sha256(again.out)
    with Checkpoint.open(plain.out) as one, Checkpoint.open(parts.out) as other:
        assert all(np.allclose(one.read(name), other.read(name), atol=2e-4) for name in one.tensors)


def test_only_the_tower_and_the_modules_that_are_named_are_adapted(toys: Toys) -> None:
    def trained(**recipe: Any) -> list[str]:
        model = load(toys.base)
        prepare(model, Recipe(**recipe), False, "the toy")
        return [name.split(".parametrizations")[0] for name, p in model.named_parameters() if p.requires_grad]

    names = trained(trainable="image", adapter={"targets": ["c_fc", "attn"]})
    assert {name.split(".")[-1] for name in names} == {"c_fc", "attn"}
    assert all(name.startswith("visual.") for name in names)
    assert trained(adapter={"targets": "resblocks.1.mlp.c_proj"})[0].endswith("resblocks.1.mlp.c_proj")
    with pytest.raises(
        UserError, match=r"targets: 'q_proj' fits no linear layer .* such as attn, out_proj, c_fc"
    ):
        trained(adapter={"targets": ["c_fc", "q_proj"]})
    with pytest.raises(UserError, match="trainable: text"):
        trained(trainable="text", adapter={"targets": ["visual.transformer.resblocks.0.attn"]})


def test_running_statistics_of_a_network_with_batch_normalisation_stay(tmp_path: Path) -> None:
    config = write_config(tmp_path / "config", vision_cfg=RESNET)
    export_base(str(config), None, tmp_path / "base", seed=1)
    model = load(tmp_path / "base")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    prepare(model, Recipe(adapter=Adapter(**LORA)), False, "the toy")
    model(*batch(0))
    assert before and all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_recipe_names_an_adapter_only_where_there_is_one_and_refuses_what_excludes_it() -> None:
    assert "adapter" not in Recipe().model_dump() and Recipe().trains == "all"
    recipe = Recipe(adapter=Adapter(rank=8))
    assert Recipe.model_validate(recipe.model_dump()) == recipe and recipe.asks_network
    assert recipe.model_dump()["adapter"]["rank"] == 8 and recipe.trains != Recipe(adapter=Adapter()).trains
    assert (
        Adapter(rank=4).scale,
        Adapter(rank=4, alpha=8).scale,
        Adapter(rank=4, alpha=8, rslora=True).scale,
    ) == (1, 2, 4)
    for key, value in {"ema": 0.9, "compile": True}.items():
        with pytest.raises(ValidationError, match=f"{key} and adapter exclude each other"):
            Recipe(adapter=Adapter(), **{key: value})
    for wrong in ({"rank": 0}, {"kind": "ia3"}, {"targets": []}, {"dropout": 0.1}):
        with pytest.raises(ValidationError):
            Adapter(**wrong)


def test_an_adapter_costs_less_memory_and_fewer_operations_than_the_network(toys: Toys) -> None:
    whole, part = (measure(toys.base, 16, adapter=adapter) for adapter in (None, Adapter(**LORA)))
    assert part.trained_parameters < whole.trained_parameters / 20
    assert part.peak_bytes < whole.peak_bytes and part.gflops_per_step < whole.gflops_per_step


@pytest.mark.parametrize("rank", [1, 3, 512, 2000])
def test_products_of_factors_on_the_grid_are_exact_so_their_order_does_not_matter(rank: int) -> None:
    rng = np.random.default_rng(rank)
    left, right = (on_grid(rng.normal(size=rank).astype(np.float32) * 10.0**e, rank) for e in (-5, 3))
    exact = sum((Fraction(float(x)) * Fraction(float(y)) for x, y in zip(left, right)), Fraction())
    order = rng.permutation(rank)
    assert Fraction(float(np.float64(left) @ np.float64(right))) == exact
    assert Fraction(float(np.float64(left[order]) @ np.float64(right[order]))) == exact
    assert np.array_equal(on_grid(left, rank), left) and not on_grid(np.zeros(3, np.float32), rank).any()
