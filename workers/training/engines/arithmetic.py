"""The arithmetic that engines share: learning rate, loss scale, seeds, optimiser, clipping, clamp of the temperature.

Invariant: each is a function of the recipe, the step number and the gradients alone, so that all engines take the same step.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch

from workers.models.base import MAX_LOGIT_SCALE
from workers.training.recipe import Recipe

GOOD_STEPS = 2000
"""After which the loss scale is doubled."""


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

    Both numbers are on the device, so that no step waits for the one before: whether a step overflowed is known there alone. The scale
    is a power of two, so multiplying by it and dividing by it are exact.
    """

    def __init__(self, enabled: bool, device: torch.device) -> None:
        self.enabled = enabled
        self.numbers = torch.tensor([65536.0 if enabled else 1.0, 0.0], device=device)
        """float32 [2]: the scale, and the good steps since it changed; to be kept with a checkpoint, and set from one."""

    def times(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to take gradients of."""
        return loss * self.numbers[0] if self.enabled else loss

    def undo(self, gradients: list[torch.Tensor]) -> None:
        """Take the scale out of gradients, in place."""
        if self.enabled:
            torch._foreach_mul_(gradients, self.numbers[0].reciprocal())

    def update(self, norm: torch.Tensor) -> torch.Tensor | None:
        """Take note of a step by the norm of its gradients; returns 1.0 if they are not finite, so that the step is to be skipped, else
        0.0; None if nothing is scaled."""
        if not self.enabled:
            return None
        failed = torch.isfinite(norm).logical_not().float()
        scale, good = self.numbers
        good = (good + 1) * (1 - failed)
        grown = (good == GOOD_STEPS).float()
        self.numbers = torch.stack([scale * (1 - failed / 2) * (1 + grown), good * (1 - grown)])
        return failed


def seed_step(seed: int, step: int, rank: int, *part: int) -> None:
    """Seed torch for one step, or a part of one (dropout is the only user), so that no random state has to survive a restart."""
    number = int(np.random.SeedSequence([seed, step, rank, *part]).generate_state(1, np.uint64)[0] >> 1)
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


def clip(parameters: list[torch.nn.Parameter], bound: float, look: bool) -> torch.Tensor:
    """Scale gradients down to the L2 norm `bound`, if they have more (0: never); returns the norm before.

    Bit for bit torch's `clip_grad_norm_`, which also multiplies by 1 where nothing is to be clipped; with `look` the norm is looked
    at, which costs nothing on a CPU, to be spared that.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total = torch.nn.utils.get_total_norm(gradients)
    if bound and not (look and (float(total) + 1e-6) * 1.001 < bound):
        torch.nn.utils.clip_grads_with_norm_(parameters, bound, total)
    return total


def skipping_step(optimizer: torch.optim.Optimizer, skipped: torch.Tensor | None) -> None:
    """The optimiser's step, which changes nothing where `skipped` is 1.0; torch's fused kernels look at it on the device."""
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()


def softmax_temperature(trained: Mapping[str, torch.nn.Parameter]) -> torch.nn.Parameter | None:
    """The temperature that is to be clamped: that of CLIP's softmax; SigLIP's sigmoid, which has a bias, knows no bound."""
    return None if "logit_bias" in trained else trained.get("logit_scale")


@torch.no_grad()
def clamp_temperature(logit_scale: torch.Tensor | None, skipped: torch.Tensor | None = None) -> None:
    """Keep a trained `logit_scale` within [0, ln 100], as CLIP and open_clip do after every step that was not skipped."""
    if logit_scale is None:
        return
    clamped = logit_scale.clamp(0, MAX_LOGIT_SCALE)
    logit_scale.copy_(clamped if skipped is None else torch.where(skipped.bool(), logit_scale, clamped))
