"""The model of a checkpoint, for measurements: a weights directory, or a file with its configuration beside it or named.

No tokenizer and no preprocessing are needed, because a measurement is made on arrays. Invariant: weights are read as they are.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from merge_service.checkpoints import CONFIG_FILE, Checkpoint
from merge_service.errors import UserError
from workers.evidence.asked import Asked, Inputs
from workers.models.configuration import OPENAI, architecture, unknown_model
from workers.models.network import build
from workers.models.weights import fill


@dataclass(frozen=True)
class Opened:
    """A model in evaluation mode, the sizes of its inputs, and the digests of its weights (content, sha256)."""

    model: torch.nn.Module
    model_cfg: Mapping[str, Any]
    preprocess: Mapping[str, Any]
    digests: tuple[str, str]

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.model.parameters()).dtype

    def images(self, inputs: Inputs) -> torch.Tensor:
        """Images as the model takes them, [N, 3, H, W] on the CPU. Raises UserError for a size that is not the model's."""
        assert inputs.images is not None
        size = self.model_cfg["vision_cfg"].get("image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        plain = inputs.images.dtype == np.uint8
        found = inputs.images.shape[1:3] if plain else inputs.images.shape[2:]
        if tuple(found) != (height, width):
            raise UserError(
                f"images are {found[0]} x {found[1]} and the model takes {height} x {width}; resize and crop them first"
            )
        images = torch.from_numpy(np.ascontiguousarray(inputs.images))
        if not plain:
            return images.float()
        mean, std = (torch.tensor(self.preprocess[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std

    def tokens(self, inputs: Inputs) -> torch.Tensor:
        """Tokens [M, context], filled up with zeros to the model's context. Raises UserError for ones that it does not have."""
        assert inputs.tokens is not None
        text = self.model_cfg["text_cfg"]
        context, size = text.get("context_length", 77), text.get("vocab_size", 49408)
        tokens = torch.from_numpy(np.ascontiguousarray(inputs.tokens).astype(np.int64))
        if tokens.shape[1] > context:
            raise UserError(
                f"tokens have {tokens.shape[1]} columns and the model's context is {context}; cut them"
            )
        if (
            text.get("hf_model_name") is None
            and len(tokens)
            and not 0 <= int(tokens.min()) <= int(tokens.max()) < size
        ):
            raise UserError(
                f"tokens are from {int(tokens.min())} to {int(tokens.max())}; the model has 0 to {size - 1}"
            )
        return torch.nn.functional.pad(tokens, (0, context - tokens.shape[1]), value=text.get("pad_id", 0))


def open_model(checkpoint: Path, asked: Asked, config: str | None = None) -> Opened:
    """The model of a checkpoint, on the device and in the precision asked for.

    `config` names its architecture where no configuration lies beside it. Raises UserError.
    """
    home = checkpoint if checkpoint.is_dir() else checkpoint.parent
    beside = home / CONFIG_FILE
    if config is not None:
        found = architecture(config, only_tokens=True)
    elif beside.is_file():
        found = architecture(str(home), only_tokens=True)
    else:
        raise unknown_model(checkpoint)
    with Checkpoint.open(checkpoint) as weights, tempfile.TemporaryDirectory() as room:
        digests = weights.digests()
        model = build(found, Path(room), str(checkpoint), only_tokens=True)
        fill(model, weights)
    try:
        model = model.to(asked.device).eval()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {asked.device!r} cannot be used: {str(error).splitlines()[0]}") from None
    if asked.precision == "bf16":
        model = model.to(torch.bfloat16)
    preprocess = {**OPENAI, **{k: v for k, v in (found.get("preprocess_cfg") or {}).items() if v is not None}}
    return Opened(model, found["model_cfg"], preprocess, digests)


def temperature_of(base: Path) -> float:
    """The logit_scale of a checkpoint, float64 of the value in the file. Raises UserError if it has none."""
    with Checkpoint.open(base) as weights:
        names = [name for name in weights.tensors if name.rpartition(".")[2] == "logit_scale"]
        if len(names) != 1:
            raise UserError(f"{base} has no logit_scale")
        return float(weights.read(names[0]).reshape(-1)[0])
