"""How a network is run while it is trained: patch dropout, a compiled image tower, activation checkpointing, the layout of pictures.

All engines train the network that `prepare` leaves. Invariant: neither names nor shapes of tensors change (but for an adapter, `low_rank`), so weights are saved and
merged as ever; what a network cannot do is refused, never left out.
"""

from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import PatchDropout, VisionTransformer
from torch.nn.modules.batchnorm import _BatchNorm

from merge_service.errors import UserError
from workers.models.model import set_trainable
from workers.training.low_rank import attach
from workers.training.recipe import Recipe

BACKEND = "inductor"
"""What compiles."""


def prepare(model: torch.nn.Module, recipe: Recipe, checkpointing: bool, who: str, seed: int = 0) -> None:
    """Set up an open_clip model, in place, for training by a recipe; its trainable towers are then in training mode.

    With `checkpointing` the blocks of both towers keep their inputs only and are computed again for the backward pass. A text tower is not
    compiled: the number of distinct texts changes from step to step. The factors of an adapter are drawn from `seed`. Raises UserError,
    which calls the model `who`.
    """
    if recipe.adapter is not None:
        attach(model, recipe.adapter, recipe.trainable, seed, who)
    set_trainable(model, recipe.trainable)
    if recipe.accumulate > 1 and any(isinstance(m, _BatchNorm) and m.training for m in model.modules()):
        raise UserError(
            f"{who} normalises over the batch, whose parts would each be normalised by themselves; recipe.accumulate must be 1. Train "
            "with a smaller recipe.batch_size, or on more workers, over which the batch is normalised as a whole"
        )
    if recipe.patch_dropout is not None:
        _drop_patches(model, recipe.patch_dropout, who)
    if checkpointing:
        _checkpoint(model, who)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    if recipe.compile:
        model.get_submodule("visual").compile(dynamic=False, backend=BACKEND)


def _drop_patches(model: torch.nn.Module, share: float, who: str) -> None:
    visual = model.get_submodule("visual")
    if not isinstance(visual, VisionTransformer):
        raise UserError(
            f"recipe.patch_dropout is for open_clip's own vision transformers, and the image tower of {who} is a "
            f"{type(visual).__name__}; remove it"
        )
    visual.patch_dropout = PatchDropout(share).train(visual.training) if share else torch.nn.Identity()


def _checkpoint(model: torch.nn.Module, who: str) -> None:
    visual = model.get_submodule("visual")
    trunk: Any = getattr(visual, "trunk", visual)
    try:
        if isinstance(visual, ModifiedResNet):
            raise NotImplementedError
        trunk.set_grad_checkpointing(True)  # timm's own: open_clip would go on without
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AssertionError, AttributeError, NotImplementedError, ValueError):
        raise UserError(
            f"resources.experts.activation_checkpointing: {who} has a {type(trunk).__name__} or a text tower that cannot compute its "
            "activations again; set it to false"
        ) from None
