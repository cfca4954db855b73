"""What an expert minimises: a contrastive loss over the whole batch, on however many ranks it is spread.

A model without a bias is trained with CLIP's symmetric softmax, one with a bias with SigLIP's sigmoid, as it was before.
Invariant: with W ranks, each holding batch/W pairs, the mean over ranks of the gradients equals the gradient one rank
would have computed on the whole batch (up to rounding). That needs features gathered *with* their gradient: each rank's
loss covers its own rows against all columns, the gather's backward pass sums the W losses, the mean over ranks divides
by W again (open_clip's `local_loss` with `gather_with_grad`). Batch normalisation takes its statistics over all ranks.
"""

import warnings
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from open_clip import CLIP, ClipLoss, CoCa
from open_clip.loss import SigLipLoss
from open_clip.transformer import TextTransformer

from workers.training.batch_norm import OverRanks, normalises_over_batch

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Features(NamedTuple):
    """Normalised fp32 features [b, d] of both towers, and the scalar temperature (exponentiated) and bias, if any."""

    image: torch.Tensor
    text: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None


class TwoTowers(torch.nn.Module):
    """An open_clip model that returns `Features`, computed in the recipe's precision with fp32 parameters.

    `fp16` and `bf16` mean autocast, for every engine alike. Features leave in fp32, so that the loss is always computed
    in fp32: at a temperature of 100, bf16 logits would be off by up to a quarter. Equal captions are encoded once: a batch
    of class names holds few distinct ones, and a text tower without dropout gives them equal features anyway.
    """

    def __init__(
        self, model: torch.nn.Module, precision: str, share_texts: bool = True, world: int = 1
    ) -> None:
        super().__init__()
        self.model = model
        self.dtype = AUTOCAST.get(precision)
        plain_text = isinstance(model, CLIP) or isinstance(getattr(model, "text", None), TextTransformer)
        self._share_texts = share_texts and plain_text and not isinstance(model, CoCa)
        self._spread = world if world > 1 and normalises_over_batch(model) else 0

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> Features:
        if not self._share_texts:
            return self._encode(images, tokens)
        distinct, place = torch.unique(tokens, dim=0, return_inverse=True)
        features = self._encode(images, distinct)
        return features._replace(text=features.text.index_select(0, place))

    def _encode(self, images: torch.Tensor, tokens: torch.Tensor) -> Features:
        norm = OverRanks(self._spread) if self._spread else nullcontext()
        with torch.autocast(images.device.type, dtype=self.dtype, enabled=self.dtype is not None), norm:
            found = self.model(images, tokens)
        if isinstance(found, dict):  # CoCa: its captions are not trained here, only the contrastive part
            image, text, scale = (found[key] for key in ("image_features", "text_features", "logit_scale"))
            bias = found.get("logit_bias")
        else:
            image, text, scale, *rest = found
            bias = rest[0] if rest else None
        return Features(image.float(), text.float(), scale.float(), None if bias is None else bias.float())


class ContrastiveLoss:
    """open_clip's `ClipLoss`, or `SigLipLoss` for a model with a bias, over all ranks.

    Calling it gives this rank's share, whose mean over ranks is the loss.
    """

    def __init__(self, rank: int, world: int) -> None:
        spread = world > 1
        if spread:  # torch and DeepSpeed warn about their own use of torch.distributed, at every collective
            warnings.filterwarnings("ignore", message=r"`?torch\.distributed\.", category=FutureWarning)
        self._softmax = ClipLoss(
            local_loss=spread, gather_with_grad=spread, cache_labels=True, rank=rank, world_size=world
        )
        self._sigmoid = SigLipLoss(rank=rank, world_size=world, dist_impl="gather")

    def __call__(self, features: Features) -> torch.Tensor:
        loss = self._softmax if features.bias is None else self._sigmoid
        found: Any = loss(features.image, features.text, features.scale, logit_bias=features.bias)
        return found
