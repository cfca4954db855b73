"""The optimiser step with torch alone: every rank holds the whole model and the whole optimiser state.

Invariant: with one rank no process group is needed; with several, gradients are averaged in one collective per step.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from workers.feed.device import device_of
from workers.jobs import EngineSpec
from workers.models.model import set_trainable
from workers.training.engines.arithmetic import (
    LossScale,
    adamw,
    clamp_temperature,
    clip,
    learning_rate,
    seed_step,
    skipping_step,
    softmax_temperature,
)
from workers.training.engines.average import Average
from workers.training.engines.groups import average_over_ranks
from workers.training.engines.protocol import Report
from workers.training.engines.snapshot import Snapshot
from workers.training.objective import ContrastiveLoss, TwoTowers
from workers.training.parts import in_parts
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
        device = device_of(spec.device)
        self._look = not device.overlaps
        self._scale = LossScale(recipe.precision == "fp16", device.place)
        self._average = None if recipe.ema is None else Average(model, self._trained, recipe.ema)
        self._snapshot = Snapshot(device)
        self._done = 0

    def step(self, images: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor | None = None) -> Report:
        seed_step(self._seed, self._done, self._rank)
        lr = learning_rate(self._done, self._steps, self._recipe)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._backward(images, tokens, places)
        gradients = [p.grad for p in self._trained.values() if p.grad is not None]
        if self._world > 1:
            average_over_ranks([*gradients, loss], self._world)
        self._scale.undo(gradients)
        norm = clip(list(self._trained.values()), self._recipe.clip, self._look)
        skipped = self._scale.update(norm)
        skipping_step(self._optimizer, skipped)
        clamp_temperature(self._temperature, skipped)
        if self._average is not None:
            self._average.update(skipped)
        self._done += 1
        return Report(torch.stack([loss, norm]), lr)

    def _backward(
        self, images: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor | None
    ) -> torch.Tensor:
        """This rank's share of the loss, once gradients are there."""
        if self._recipe.accumulate == 1:
            loss = self._loss(self._towers(images, tokens, places))
            self._scale.times(loss).backward()
            return loss.detach()
        parts, places = self._towers.parts(images, tokens, places, self._recipe.accumulate)
        seed = partial(seed_step, self._seed, self._done, self._rank)
        return in_parts(
            self._towers,
            self._loss,
            parts,
            places,
            seed,
            lambda _, scalar: self._scale.times(scalar).backward(),
        )

    def weights(self) -> dict[str, torch.Tensor]:
        state = self._model.state_dict() | (self._average.tensors if self._average else {})
        return {name: tensor.detach().cpu() for name, tensor in state.items()}

    def save(self, directory: Path) -> Callable[[], None]:
        if self._rank:
            return lambda: None
        buffers = {name for name, _ in self._model.named_buffers()}
        state = self._model.state_dict()
        tensors = {f"model.{name}": state[name] for name in state if name in self._trained or name in buffers}
        for name, parameter in self._trained.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value
        tensors["loss_scale"] = self._scale.numbers
        for name, tensor in (self._average.tensors if self._average else {}).items():
            tensors[f"average.{name}"] = tensor
        (directory / "engine.json").write_text(json.dumps({"done": self._done}))
        return self._snapshot.take(tensors, directory / "engine.safetensors")

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
                    "step": tensors[f"step.{name}"].to(parameter.device),
                    **{  # laid out as the parameter is, or the fused step would take the wrong numbers
                        key: torch.empty_like(parameter, requires_grad=False).copy_(tensors[f"{key}.{name}"])
                        for key in ("exp_avg", "exp_avg_sq")
                    },
                }
        if self._average is not None:
            self._average.load(tensors)
        self._done = numbers["done"]
        before = [numbers.get("scale", 1.0), numbers.get("good_steps", 0.0)]  # where earlier versions kept it
        self._scale.numbers = tensors.get("loss_scale", torch.tensor(before)).to(self._scale.numbers.device)

    def close(self) -> None:
        self._optimizer.state.clear()
        self._trained.clear()
