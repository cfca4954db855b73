"""The arithmetic that engines share: learning rate, loss scale, seeds, optimiser, clipping, clamp of the temperature.

Invariant: each is a function of the recipe, the step number and the gradients alone, so that all engines take the same step.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch

from workers.models.base import MAX_LOGIT_SCALE
from workers.training.recipe import Recipe


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


def softmax_temperature(trained: Mapping[str, torch.nn.Parameter]) -> torch.nn.Parameter | None:
    """The temperature that is to be clamped: that of CLIP's softmax; SigLIP's sigmoid, which has a bias, knows no bound."""
    return None if "logit_bias" in trained else trained.get("logit_scale")


@torch.no_grad()
def clamp_temperature(logit_scale: torch.Tensor | None) -> None:
    """Keep a trained `logit_scale` within [0, ln 100], as CLIP and open_clip do after every step."""
    if logit_scale is not None:
        logit_scale.clamp_(0, MAX_LOGIT_SCALE)
