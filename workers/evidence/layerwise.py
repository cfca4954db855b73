"""Gram matrices for RegMean++: each block of an expert on what the merged blocks before it give.

Embeddings and the norm before the blocks are the mean of the experts. For block l the images of every task pass through the merged
blocks below; the Gram matrices are those inside expert i's block l on that input; the block is merged with them, and so on. The merge
itself is then an ordinary RegMean over the files.

Invariant: what is solved here to go on is what the merge computes from the files, up to rounding.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from merge_service.errors import UserError
from merge_service.statistics import About, beside, write
from merge_service.techniques import fitted, shrunk, weights_of
from workers.evidence.asked import Asked, Inputs
from workers.evidence.grams import Grams
from workers.evidence.network import Opened, open_model
from workers.evidence.passes import CHUNK, encode_images, tapped

KIND = "layer_gram"
PREFIX = "visual.transformer.resblocks."
Block = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Experts:
    """Experts in their order with the images of each one's task, and the parameters of the merge (`off_diagonal`, weights)."""

    paths: Sequence[Path]
    inputs: Sequence[Inputs]
    params: Mapping[str, Any]
    config: str | None = None


class _Reached(Exception):
    """The input of the first block is known; the rest of the pass is not needed."""


def measure_layerwise(experts: Experts, asked: Asked, place: Path) -> list[Path]:
    """Write the Gram matrices of every expert into `place`; returns the files, in order.

    Raises UserError for experts without images, or an image tower that is not open_clip's own transformer.
    """
    if len(experts.inputs) != len(experts.paths):
        raise UserError(
            f"inputs has {len(experts.inputs)} entries for {len(experts.paths)} experts; give one for each"
        )
    lacking = [str(path) for path, one in zip(experts.paths, experts.inputs) if one.images is None]
    if lacking:
        raise UserError(f"regmean_plus needs images of every expert's task; inputs of {lacking[0]} has none")
    models = [open_model(path, asked, experts.config) for path in experts.paths]
    merged = _mean(models, experts.params)
    blocks = getattr(getattr(merged.model.visual, "transformer", None), "resblocks", None)
    if blocks is None:
        raise UserError(
            "regmean_plus merges the blocks of open_clip's own image transformer; this model has another image tower"
        )
    drawn = [one.drawn(asked.most, asked.seed) for one in experts.inputs]
    hidden = [_before_blocks(merged, merged.images(one)) for one in drawn]
    found = [Grams() for _ in models]
    for number, block in enumerate(blocks):
        for model, grams, states in zip(models, found, hidden):
            own = model.model.visual.transformer.resblocks[number]  # type: ignore[union-attr,index]
            with torch.no_grad(), tapped(model, grams.take):
                for start in range(0, len(states), CHUNK):
                    own(states[start : start + CHUNK])  # type: ignore[operator]
        _merge(merged, models, found, f"{PREFIX}{number}.", experts.params)
        with torch.no_grad():
            hidden = [torch.cat([block(part) for part in states.split(CHUNK)]) for states in hidden]
    return [_write(place, *one) for one in zip(range(len(models)), models, found, drawn)]


def _write(place: Path, number: int, model: Opened, grams: Grams, inputs: Inputs) -> Path:
    file = beside(place / f"{number}.safetensors", KIND)
    tensors = {name: one.numpy() for name, one in grams.means().items() if name.startswith(PREFIX)}
    tensors = {name: one for name, one in tensors.items() if one.ndim == 2}
    rows = {name: grams.rows[name] for name in tensors}
    content, sha256 = model.digests
    write(file, tensors, About(KIND, rows, len(inputs.images), sha256, content))
    return file


def _mean(models: Sequence[Opened], params: Mapping[str, Any]) -> Opened:
    """The weighted mean of the experts, as a model."""
    first = models[0]
    merged = Opened(copy.deepcopy(first.model), first.model_cfg, first.preprocess, first.digests)
    states = [one.model.state_dict() for one in models]
    with torch.no_grad():
        for name, value in merged.model.state_dict().items():
            if value.is_floating_point():
                shares = weights_of(params, len(models), name)
                value.copy_(sum(share * state[name].double() for share, state in zip(shares, states)))
    return merged


def _before_blocks(merged: Opened, images: torch.Tensor) -> torch.Tensor:
    """The input of the first block, [N, tokens, d]."""
    seen: list[torch.Tensor] = []

    def stop(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    hook = merged.model.visual.transformer.resblocks[0].register_forward_pre_hook(stop)  # type: ignore[union-attr,index]
    try:
        with torch.no_grad():
            for start in range(0, len(images), CHUNK):
                try:
                    encode_images(merged, images[start : start + CHUNK])
                except _Reached:
                    continue
    finally:
        hook.remove()
    return torch.cat(seen)


def _merge(
    merged: Opened,
    models: Sequence[Opened],
    found: Sequence[Grams],
    prefix: str,
    params: Mapping[str, Any],
) -> None:
    """Merge one block's matrices in place, as `regression.RegMean` does."""
    means = [grams.means() for grams in found]
    for name, value in merged.model.named_parameters():
        if not name.startswith(prefix) or name not in means[0] or means[0][name].ndim != 2:
            continue
        anchor = value.detach().double().cpu().numpy()
        total, moment = 0.0, 0.0
        for share, one, model in zip(weights_of(params, len(models), name), means, models):
            gram = one[name].numpy()
            gram = share * shrunk(gram.reshape(-1), len(gram), params["off_diagonal"]).reshape(gram.shape)
            own = model.model.state_dict()[name].double().cpu().numpy()
            total, moment = total + gram, moment + (own - anchor) @ gram
        moved = fitted(np.zeros_like(anchor), moment, total, xp=np)
        with torch.no_grad():
            value.copy_(torch.from_numpy(anchor + moved))
