"""Forward passes over a measurement's rows: what of each input counts, and class scores.

Of texts only tokens up to and including the end token count, because later ones cannot influence the output; of a norm after which
one token is pooled, that token alone. Rows pass in fixed chunks, so that nothing depends on how many fit at once.

Invariant: a pass over rows a and b gives the rows of a pass over a and of one over b.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from merge_service.errors import NonFiniteCheckpoint
from workers.evidence.asked import Inputs
from workers.evidence.network import Opened
from workers.evidence.taps import Taps, opened

CHUNK = 32
"""Examples of one pass."""
Rows = Callable[[str, str, torch.Tensor, torch.Tensor, Any], None]
"""Takes a parameter's name, how it acts, its input and output, and an index of what counts of both (None: everything)."""


@dataclass
class Counting:
    """Which rows of the present pass count; `keep` [texts, context] and `ends` [texts] for a pass of the text tower."""

    opened: Opened
    take: Rows
    keep: torch.Tensor | None = None
    ends: torch.Tensor | None = None

    def __call__(self, name: str, how: str, x: torch.Tensor, out: torch.Tensor) -> None:
        """A `taps.Take` that says what counts."""
        self.take(name, how, x, out, self.of(name, out if how == "table" else x))

    def of(self, name: str, x: torch.Tensor) -> Any:
        """What of an input counts, as an index; None for all of it."""
        if x.ndim < 3:
            return None
        if self.keep is None:
            pooled = (
                name.endswith("ln_post.weight")
                and getattr(self.opened.model.visual, "pool_type", "") == "tok"
            )
            return (slice(None), 0) if pooled else None
        if tuple(x.shape[:2]) != tuple(self.keep.shape):
            return None
        if name.endswith("ln_final.weight") and self.ends is not None:
            return (torch.arange(len(x), device=x.device), self.ends)
        return self.keep


@contextlib.contextmanager
def tapped(model: Opened, take: Rows) -> Iterator[Counting]:
    """A model whose uses of parameters are passed to `take`, for as long as the context lasts."""
    counting = Counting(model, take)
    with opened(model.model), Taps(model.model, counting):
        yield counting


def encode_texts(model: Opened, tokens: torch.Tensor, counting: Counting | None = None) -> torch.Tensor:
    """Normalised embeddings of texts [M, d]."""
    tokens = tokens.to(model.device)
    if counting is not None:
        counting.keep, counting.ends = kept(model, tokens)
    try:
        found = model.model.encode_text(tokens, normalize=True)  # type: ignore[operator]
    finally:
        if counting is not None:
            counting.keep = counting.ends = None
    return found


def encode_images(model: Opened, images: torch.Tensor) -> torch.Tensor:
    """Normalised embeddings of images [N, d]."""
    return model.model.encode_image(images.to(model.device, model.dtype), normalize=True)  # type: ignore[operator]


def kept(model: Opened, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which tokens count [M, context], and the end of each text if that is where it is pooled.

    The end token of CLIP has the largest id. Where a model does not pool there, all tokens count that are not padding.
    """
    text = model.model_cfg["text_cfg"]
    if text.get("hf_model_name") is None and text.get("pool_type", "argmax") == "argmax":
        ends = tokens.argmax(1)
        return torch.arange(tokens.shape[1], device=tokens.device)[None] <= ends[:, None], ends
    return tokens != text.get("pad_id", 0), None


@dataclass(frozen=True)
class Classifier:
    """Class scores: frozen class embeddings `head` at a temperature, or through the model's text tower and its own temperature."""

    opened: Opened
    head: torch.Tensor | None
    scale: float
    tokens: torch.Tensor | None = None

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.head if self.head is not None else self.tokens)  # type: ignore[arg-type]

    def embeddings(self, counting: Counting | None = None) -> torch.Tensor:
        """Class embeddings [C, d], normalised."""
        if self.head is not None:
            return self.head
        assert self.tokens is not None
        return encode_texts(self.opened, self.tokens, counting)

    def log_probabilities(self, images: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """log p(y | x), float32 [N, C]."""
        features = encode_images(self.opened, images).float()
        own: torch.Tensor = self.opened.model.logit_scale  # type: ignore[assignment]
        scale = (
            own.float().exp() if self.head is None else torch.tensor(self.scale, device=features.device).exp()
        )
        return F.log_softmax(scale.float() * features @ embeddings.float().T, dim=1)


def classifier(model: Opened, inputs: Inputs, towers: str) -> Classifier:
    """The class scores that gradients are taken of."""
    own = float(model.model.logit_scale.detach().reshape(-1)[0])  # type: ignore[operator]
    if towers == "both":
        return Classifier(model, None, own, model.tokens(inputs))
    head = F.normalize(torch.from_numpy(inputs.head).float(), dim=1).to(model.device)
    return Classifier(model, head, own if inputs.logit_scale is None else inputs.logit_scale)


def check(name: str, values: torch.Tensor) -> None:
    """Raise `NonFiniteCheckpoint` for NaN or infinity."""
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteCheckpoint(
            f"{name}: the model gives NaN or infinity on these inputs; check the weights, or measure in fp32"
        )
