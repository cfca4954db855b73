"""One optimiser step at a time, behind one small protocol.

Invariant: both engines compute the same step (same loss, schedule, clipping, loss scaling and clamp of the
temperature), so which of them trains an expert is a matter of memory and speed; and everything a step depends on is in
the weights, the optimiser state and the step number, so that a reloaded engine goes on with the same bits.
"""

import datetime
import json
import math
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from workers.jobs import EngineSpec
from workers.models.base import MAX_LOGIT_SCALE
from workers.models.model import set_trainable
from workers.training.objective import ContrastiveLoss, TwoTowers
from workers.training.recipe import Recipe


class Engine(Protocol):
    """What `train_expert` needs of a training engine. Every method is collective: all ranks call it together."""

    def step(self, images: torch.Tensor, tokens: torch.Tensor) -> dict[str, float]:
        """One optimiser step on this rank's share [b, 3, H, W], [b, context] of the batch.

        Returns {"loss": mean over all ranks, "grad_norm": before clipping, "lr"}. `loss` and `grad_norm` may be
        non-finite: that is for the caller to judge (with fp16 an infinite norm only means that the step was skipped).
        """

    def weights(self) -> dict[str, torch.Tensor]:
        """Every key of `model.state_dict()` on the CPU, floats in fp32; gathered on all ranks."""

    def save(self, directory: Path) -> None:
        """Write what `load` needs into an existing directory."""

    def load(self, directory: Path) -> None:
        """Go on from what `save` wrote, bit for bit."""

    def close(self) -> None:
        """Give back memory and hooks; the process group stays."""


def make_engine(
    model: torch.nn.Module, recipe: Recipe, steps: int, spec: EngineSpec, seed: int, rank: int = 0
) -> Engine:
    """The engine `spec` asks for, around a freshly loaded fp32 model, which it takes over."""
    if spec.kind == "deepspeed":
        from workers.training.engines.deepspeed_engine import DeepSpeedEngine  # takes seconds to import

        return DeepSpeedEngine(model, recipe, steps, spec, seed, rank)
    return TorchEngine(model, recipe, steps, spec, seed, rank)


def join_group(rank: int, world: int, host: str, port: int, device: str, timeout: float = 600.0) -> None:
    """Make this process rank `rank` of a group that lives as long as the process; joining the same group again is free.

    Sets the environment variables that torch and DeepSpeed read. `timeout` (seconds) bounds every later collective, so
    that a dead peer cannot hold the others for ever.
    """
    _join(rank, world, device, {"MASTER_ADDR": host, "MASTER_PORT": str(port)}, timeout)


def join_alone(device: str) -> None:
    """Make this process a group of one, without a port; DeepSpeed wants a group even then."""
    _join(0, 1, device, {}, 600.0)


def _join(rank: int, world: int, device: str, place: dict[str, str], timeout: float) -> None:
    if distributed.is_initialized():
        current = (distributed.get_rank(), distributed.get_world_size())
        assert current == (rank, world), f"this process is rank {current[0]} of {current[1]} already"
        return
    os.environ.update(place | {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"})
    limit = datetime.timedelta(seconds=timeout)
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=_meeting_point(place["MASTER_ADDR"], int(place["MASTER_PORT"]), rank, world, limit)
        if place
        else distributed.HashStore(),
        rank=rank,
        world_size=world,
        timeout=limit,
    )


def _meeting_point(
    host: str, port: int, rank: int, world: int, limit: datetime.timedelta
) -> distributed.Store:
    """The store where ranks find each other. torch's own would listen on every interface of rank 0's machine; this one listens
    on `host` only, and ranks of one machine talk over its loopback."""
    if host == "127.0.0.1":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if rank != 0:
        return distributed.TCPStore(host, port, world, timeout=limit)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=max(128, world))
    return distributed.TCPStore(
        host, port, world, is_master=True, timeout=limit, master_listen_fd=listening.detach()
    )


def leave_group() -> None:
    """End this process's membership, if any: the last thing a worker does, since DeepSpeed cannot join another group."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """The rate of optimiser step `step` (0-based) of `steps`: linear warm-up, then a cosine to lr * min_lr_ratio.

    Follows open_clip's `cosine_lr`: the first step already has rate lr / warm-up steps, and the cosine's end lies one
    step after the last.
    """
    warmup = round(recipe.warmup * steps)
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    low = recipe.lr * recipe.min_lr_ratio
    return low + (recipe.lr - low) * 0.5 * (1 + math.cos(math.pi * progress))


class LossScale:
    """Dynamic loss scaling with torch.amp.GradScaler's rule: halve on overflow, double after 2000 good steps.

    Kept as two plain numbers because both engines must share it and a checkpoint must hold it exactly.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = 65536.0 if enabled else 1.0
        self.good_steps = 0

    def update(self, overflowed: bool) -> None:
        if not self.enabled:
            return
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.scale *= 0.5
        elif self.good_steps == 2000:
            self.scale, self.good_steps = self.scale * 2, 0

    def state(self) -> dict[str, float]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def restore(self, state: dict[str, float]) -> None:
        self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step (dropout is the only user), so that no random state has to survive a restart."""
    number = int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():  # otherwise torch.manual_seed would note down a stack trace every time
        torch.cuda.manual_seed_all(number)


def adamw(parameters: list[torch.nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    """The recipe's optimiser; weight decay on every parameter, as FoMo-in-Flux has it."""
    return torch.optim.AdamW(
        parameters,
        lr=recipe.lr,
        betas=recipe.betas,
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


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


def clip(parameters: list[torch.nn.Parameter], bound: float) -> float:
    """Scale gradients down to the L2 norm `bound`, if they have more (0: never); returns the norm before.

    Bit for bit torch's `clip_grad_norm_`, which also multiplies by 1 where nothing is to be clipped.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total = torch.nn.utils.get_total_norm(gradients)
    norm = float(total)
    if bound and not (norm + 1e-6) * 1.001 < bound:
        torch.nn.utils.clip_grads_with_norm_(parameters, bound, total)
    return norm


def average_over_ranks(tensors: list[torch.Tensor], world: int) -> None:
    """Replace every tensor by its mean over ranks, in one collective."""
    flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= world
    offset = 0
    for tensor in tensors:
        tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
        offset += tensor.numel()


def softmax_temperature(trained: Mapping[str, torch.nn.Parameter]) -> torch.nn.Parameter | None:
    """The temperature that is to be clamped: that of CLIP's softmax; SigLIP's sigmoid, which has a bias, knows no bound."""
    return None if "logit_bias" in trained else trained.get("logit_scale")


@torch.no_grad()
def clamp_temperature(logit_scale: torch.Tensor | None) -> None:
    """Keep a trained `logit_scale` within [0, ln 100], as CLIP and open_clip do after every step."""
    if logit_scale is not None:
        logit_scale.clamp_(0, MAX_LOGIT_SCALE)
