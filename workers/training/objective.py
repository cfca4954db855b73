"""The training objective: a contrastive loss over the whole batch, on any number of ranks.

A model without a bias is trained with CLIP's symmetric softmax, a model with a bias with SigLIP's sigmoid; so training continues with
the loss of pretraining.

Invariant: with W ranks of batch/W pairs each, the mean over ranks of the gradients equals the gradient of one rank on the whole
batch, up to rounding. For that, features are gathered *with* their gradient (open_clip's `local_loss` with `gather_with_grad`): the loss
of a rank covers its own rows and all columns, the backward pass of the gather sums the W losses, and the mean over ranks divides by W.
Batch normalisation takes its statistics over all ranks.
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
    """Normalised fp32 features [b, d] of both towers, the scalar temperature (exponentiated), and the scalar bias, if any."""

    image: torch.Tensor
    text: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None


class TwoTowers(torch.nn.Module):
    """An open_clip model that returns `Features`, computed in the precision of the recipe with fp32 parameters.

    Inputs are images float32 [b, 3, H, W], tokens int64 [u, context] and, optionally, places int64 [b]: row places[i] of `tokens` belongs
    to image i (without `places`, u = b). So equal captions are encoded once; a batch of class names holds few distinct ones, and a text
    tower without dropout gives equal captions equal features. `fp16` and `bf16` mean autocast for every engine. Features are fp32, and
    so is the loss: at a temperature of 100, bf16 logits would have errors of up to a quarter.
    """

    def __init__(self, model: torch.nn.Module, precision: str, world: int = 1) -> None:
        super().__init__()
        self.model = model
        self.dtype = AUTOCAST.get(precision)
        plain_text = isinstance(model, CLIP) or isinstance(getattr(model, "text", None), TextTransformer)
        self._share_texts = plain_text and not isinstance(model, CoCa)
        self._spread = world if world > 1 and normalises_over_batch(model) else 0

    def forward(
        self, images: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor | None = None
    ) -> Features:
        if places is None:
            return self._encode(images, tokens)
        if not self._share_texts:
            return self._encode(images, tokens.index_select(0, places))
        features = self._encode(images, tokens)
        return features._replace(text=features.text.index_select(0, places))

    def parts(
        self, images: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor | None, count: int
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor | None]:
        """A batch in `count` parts (images, tokens), whose features in a row are those of the batch; with places, those of the distinct
        texts, to be selected by what comes second. Every part has as many images, and at least one text."""
        if places is not None and not self._share_texts:
            tokens, places = tokens.index_select(0, places), None
        elif len(tokens) < count:
            tokens = tokens.repeat(-(-count // len(tokens)), 1)
        cut = (torch.tensor_split(one, count) for one in (images, tokens))
        return list(zip(*cut, strict=True)), places

    def _encode(self, images: torch.Tensor, tokens: torch.Tensor) -> Features:
        norm = OverRanks(self._spread) if self._spread else nullcontext()
        with torch.autocast(images.device.type, dtype=self.dtype, enabled=self.dtype is not None), norm:
            found = self.model(images, tokens)
        if isinstance(found, dict):  # CoCa: only the contrastive part is trained, not the captioning
            image, text, scale = (found[key] for key in ("image_features", "text_features", "logit_scale"))
            bias = found.get("logit_bias")
        else:
            image, text, scale, *rest = found
            bias = rest[0] if rest else None
        return Features(image.float(), text.float(), scale.float(), None if bias is None else bias.float())


class ContrastiveLoss:
    """open_clip's `ClipLoss`, or `SigLipLoss` for a model with a bias, over all ranks.

    A call returns a scalar, the part of this rank; the mean over ranks is the loss.
    """

    def __init__(self, rank: int, world: int) -> None:
        spread = world > 1
        if spread:  # torch and DeepSpeed warn about their own use of torch.distributed at every collective
            warnings.filterwarnings("ignore", message=r"`?torch\.distributed\.", category=FutureWarning)
        self._softmax = ClipLoss(
            local_loss=spread, gather_with_grad=spread, cache_labels=True, rank=rank, world_size=world
        )
        self._sigmoid = SigLipLoss(rank=rank, world_size=world, dist_impl="gather")

    def __call__(self, features: Features) -> torch.Tensor:
        loss = self._softmax if features.bias is None else self._sigmoid
        found: Any = loss(features.image, features.text, features.scale, logit_bias=features.bias)
        return found
