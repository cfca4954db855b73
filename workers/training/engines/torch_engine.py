"""The optimiser step with torch alone: every rank holds the whole model and the whole optimiser state.

Invariant: with one rank no process group is needed; with several, gradients are averaged in one collective per step.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from workers.jobs import EngineSpec
from workers.models.model import set_trainable
from workers.training.engines.arithmetic import (
    LossScale,
    adamw,
    clamp_temperature,
    clip,
    learning_rate,
    seed_step,
    softmax_temperature,
)
from workers.training.engines.groups import average_over_ranks
from workers.training.objective import ContrastiveLoss, TwoTowers
from workers.training.recipe import Recipe


class TorchEngine:
    """Plain torch, parameters whole on every rank; with several ranks, gradients are averaged after the backward pass."""

    def __init__(
        self, model: torch.nn.Module, recipe: Recipe, steps: int, spec: EngineSpec, seed: int, rank: int = 0
    ) -> None:
        self._model, self._recipe, self._steps, self._seed = model, recipe, steps, seed
        self._rank, self._world = rank, spec.world
        trained = set(set_trainable(model, recipe.trainable))
        self._trained = {name: p for name, p in model.named_parameters() if name in trained}
        self._towers = TwoTowers(model, recipe.precision, world=spec.world)
        self._loss = ContrastiveLoss(rank, spec.world)
        self._temperature = softmax_temperature(self._trained)
        self._optimizer = adamw(list(self._trained.values()), recipe)
        self._scale = LossScale(recipe.precision == "fp16")
        self._done = 0

    def step(self, images: torch.Tensor, tokens: torch.Tensor) -> dict[str, float]:
        seed_step(self._seed, self._done, self._rank)
        lr = learning_rate(self._done, self._steps, self._recipe)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        loss = self._loss(self._towers(images, tokens))
        self._optimizer.zero_grad(set_to_none=True)
        (loss * self._scale.scale).backward()
        loss = loss.detach()
        gradients = [p.grad for p in self._trained.values() if p.grad is not None]
        if self._world > 1:
            average_over_ranks([*gradients, loss], self._world)
        if self._scale.enabled:
            torch._foreach_mul_(gradients, 1 / self._scale.scale)
        norm = clip(list(self._trained.values()), self._recipe.clip)
        skipped = self._scale.enabled and not math.isfinite(norm)
        if not skipped:
            self._optimizer.step()
            clamp_temperature(self._temperature)
        self._scale.update(skipped)
        self._done += 1
        return {"loss": float(loss), "grad_norm": norm, "lr": lr}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().cpu() for name, tensor in self._model.state_dict().items()}

    def save(self, directory: Path) -> None:
        if self._rank:
            return
        buffers = {name for name, _ in self._model.named_buffers()}
        state = self._model.state_dict()
        tensors = {f"model.{name}": state[name] for name in state if name in self._trained or name in buffers}
        for name, parameter in self._trained.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "engine.safetensors"
        )
        numbers = {"done": self._done, **self._scale.state()}
        (directory / "engine.json").write_text(json.dumps(numbers))

    def load(self, directory: Path) -> None:
        numbers = json.loads((directory / "engine.json").read_text())
        tensors = load_file(directory / "engine.safetensors")
        state = self._model.state_dict()
        for name in state:
            if f"model.{name}" in tensors:
                state[name].copy_(tensors[f"model.{name}"])
        for name, parameter in self._trained.items():
            if f"exp_avg.{name}" in tensors:
                self._optimizer.state[parameter] = {
                    key: tensors[f"{key}.{name}"].to(parameter.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        self._done = numbers["done"]
        self._scale.restore(numbers)

    def close(self) -> None:
        self._optimizer.state.clear()
        self._trained.clear()
