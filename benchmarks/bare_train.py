"""The expert of `ours_train.py`, trained by a plain loop over torch and open_clip.

Decoded images of all datasets are in memory as one uint8 tensor, and their prompts are tokenised once. `grid_sample` makes a random
resized crop of the whole batch. Fused AdamW, a cosine with warm-up, clipping. No checkpoints, no checks, no reports.
With "share_texts" equal prompts of a batch go through the text tower once, as in our own engine.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from jobs import expert, recipe
from ours_train import SETTLING, clocks, rates
from safetensors.torch import save_file
from torch.nn import functional

from workers.data.decode import load
from workers.data.mixture import batch_counts
from workers.jobs import Source
from workers.models.network import quiet


class Data:
    """Images [N, 3, H, W] and tokens [N, context] of one source of the mixture, in a shuffled order, over and over."""

    def __init__(
        self, sources: tuple[Source, ...], cache: str, size: int, config: dict, tokenizer: Any
    ) -> None:
        parts = [load(source, size, cache, config) for source in sources]
        images = np.concatenate([part.images[:] for part in parts])
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        self.tokens = tokenizer([part.texts(row)[0] for part in parts for row in range(len(part))])
        self.order = torch.randperm(len(self.images))

    def take(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        if len(self.order) < count:
            self.order = torch.randperm(len(self.images))
        rows, self.order = self.order[:count], self.order[count:]
        return self.images[rows], self.tokens[rows]


def crop(images: torch.Tensor, scale: tuple[float, float], ratio: tuple[float, float]) -> torch.Tensor:
    """RandomResizedCrop of square images, all at once."""
    count = len(images)
    area = torch.empty(count).uniform_(*scale)
    aspect = torch.empty(count).uniform_(math.log(ratio[0]), math.log(ratio[1])).exp()
    wide, high = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = wide, high
    theta[:, 0, 2], theta[:, 1, 2] = ((1 - side) * (2 * torch.rand(count) - 1) for side in (wide, high))
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(job: dict[str, Any], steps: int) -> tuple[list[tuple[float, float]], float]:
    """Clocks at the start, after every step and at the end; the last loss."""
    stamps, settings, sources = [clocks()], recipe(job), expert(job, steps)
    with quiet():
        model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{job['model']}")
    config = model.visual.preprocess_cfg
    tokenizer = open_clip.get_tokenizer(f"local-dir:{job['model']}")
    given = {"pretraining": sources.pretraining, "update": sources.update, "buffer": sources.buffer}
    data = {name: Data(of, job["cache"], config["size"], config, tokenizer) for name, of in given.items()}
    counts = batch_counts(
        settings.batch_size, settings.mixture.model_dump(), {n: len(d.images) for n, d in data.items()}
    )
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.precision)
    objective = open_clip.ClipLoss(cache_labels=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.lr, settings.betas, settings.eps, settings.weight_decay, fused=True
    )
    model.train()
    for step in range(steps):
        taken = [data[name].take(count) for name, count in counts.items()]
        images = torch.cat([part for part, _ in taken]).float().div_(255)
        images = crop(images, settings.augment.scale, settings.augment.ratio).sub_(mean).div_(std)
        tokens = torch.cat([part for _, part in taken])
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, settings.lr, round(settings.warmup * steps))
        place = None
        if job["share_texts"]:
            tokens, place = torch.unique(tokens, dim=0, return_inverse=True)
        with torch.autocast("cpu", dtype=half, enabled=half is not None):
            image, text, scale = model(images, tokens)
        text = text if place is None else text[place]
        loss = objective(image.float(), text.float(), scale)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        stamps.append(clocks())
    save_file(model.state_dict(), Path(job["out"], "model.safetensors"))
    stamps.append(clocks())
    return stamps, float(loss)


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Train a short expert first, then the one that counts."""
    torch.set_num_threads(job["threads"])
    train(job, SETTLING)
    stamps, loss = train(job, job["steps"])
    return rates(job, stamps, {"loss": loss})


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
