"""Training batches: images and tokens of any step, for any rank, without having made the steps before.

Invariant: `Batches.batch(step)` depends on (data, recipe, seed, step, rank, world) only, and the ranks' batches of one step
are the parts of one global batch, whatever `world` is.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from merge_service.errors import UserError
from workers.data.decode import Samples, height_and_width, load, standardise
from workers.data.mixture import SOURCES, batch_counts, batch_indices, generator
from workers.jobs import Source, TrainJob

Tokenizer = Callable[[list[str]], torch.Tensor]
Augmentation = Callable[[torch.Tensor, np.random.Generator], torch.Tensor]


class Pool:
    """Several splits behind one row of indices."""

    def __init__(self, parts: Sequence[Samples]):
        self.parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def images(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Copy the images, uint8 [H, W, 3] each, into the rows of `out`."""
        parts, rows = self._places(indices)
        for part in np.unique(parts):
            out[parts == part] = self.parts[part].images[rows[parts == part]]

    def text(self, indices: np.ndarray, draws: np.ndarray) -> list[str]:
        """One of the texts of each sample, chosen by a draw in [0, 1)."""
        chosen = []
        for part, row, draw in zip(*self._places(indices), draws, strict=True):
            texts = self.parts[part].texts(row)
            chosen.append(texts[int(draw * len(texts))])
        return chosen

    def _places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Part and row in it, per index."""
        parts = np.searchsorted(self._starts, indices, side="right") - 1
        return parts, indices - self._starts[parts]


class Batches:
    """The batches of one training job, as seen by one rank.

    `preprocess` is the model's open_clip preprocess_cfg (size, mean, std, interpolation, resize_mode, fill_color). `augment`, if
    given, changes float32 [b, 3, H, W] images in [0, 1] after the crop and is given a generator of (seed, step, rank).
    Raises UserError if the batch does not divide among the ranks, or the mixture asks for data that is not there.
    """

    def __init__(
        self, job: TrainJob, tokenizer: Tokenizer, preprocess: Mapping[str, Any], rank: int = 0, world: int = 1, *,
        augment: Augmentation | None = None,
    ):  # fmt: skip
        self.batch_size, self.seed = int(job.recipe["batch_size"]), job.seed
        self.mixture, self.crop = dict(job.recipe["mixture"]), dict(job.recipe["augment"])
        if self.batch_size % world:
            raise UserError(
                f"task {job.task!r}: batch_size {self.batch_size} does not divide among {world} workers; make it a multiple"
            )
        self._rank, self._world, self._tokenizer, self._augment = rank, world, tokenizer, augment
        self._mean, self._std = tuple(preprocess["mean"]), tuple(preprocess["std"])
        self._size = height_and_width(preprocess["size"])
        given: dict[str, tuple[Source, ...]] = {
            "pretraining": job.pretraining,
            "update": job.update,
            "buffer": job.buffer,
        }
        self.pools = {
            name: Pool([load(source, preprocess["size"], job.cache, preprocess) for source in given[name]] if self.mixture[name] > 0 else [])
            for name in SOURCES
        }  # fmt: skip
        self.sizes = {name: len(pool) for name, pool in self.pools.items()}
        batch_counts(self.batch_size, self.mixture, self.sizes)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's share of the global batch of `step` (0-based): images float32 [b, 3, H, W], tokens int64 [b, context]."""
        indices = batch_indices(step, self.seed, self.batch_size, self.mixture, self.sizes)
        draws = generator(self.seed, 1, step).random((self.batch_size, 1 + CROP_DRAWS))
        images = np.empty((self.batch_size // self._world, *self._size, 3), np.uint8)
        texts: list[str] = []
        start = 0
        for name, rows in indices.items():
            first = (self._rank - start) % self._world
            mine = rows[first :: self._world]
            self.pools[name].images(mine, images[len(texts) : len(texts) + len(mine)])
            texts += self.pools[name].text(mine, draws[start + first : start + len(rows) : self._world, 0])
            start += len(rows)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32).div_(255)
        pixels = random_resized_crop(
            pixels, draws[self._rank :: self._world, 1:], self.crop["scale"], self.crop["ratio"]
        )
        if self._augment is not None:
            pixels = self._augment(pixels, generator(self.seed, 2, step, self._rank))
        return standardise(pixels, self._mean, self._std), self._tokenizer(texts)


_TRIES = 10
CROP_DRAWS = 2 * _TRIES + 2


def random_resized_crop(
    images: torch.Tensor, draws: np.ndarray, scale: Sequence[float], ratio: Sequence[float]
) -> torch.Tensor:
    """Crop a random box out of each image and resize it back, all images at once.

    `images` float32 [b, 3, H, W]; `draws` float64 [b, CROP_DRAWS] in [0, 1). The box follows torchvision's RandomResizedCrop
    (area uniform in `scale`, aspect log-uniform in `ratio`, ten tries, then the largest centred box of a permitted aspect), except
    that its edges need not fall on whole pixels; it is read bilinearly, with the edge pixels continued outward.
    """
    height, width = images.shape[-2:]
    boxes = torch.from_numpy(crop_boxes(draws, height, width, scale, ratio)).to(torch.float32)
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = boxes[:, 3], boxes[:, 2]
    theta[:, 0, 2] = 2 * boxes[:, 1] + boxes[:, 3] - 1
    theta[:, 1, 2] = 2 * boxes[:, 0] + boxes[:, 2] - 1
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def crop_boxes(
    draws: np.ndarray, height: int, width: int, scale: Sequence[float], ratio: Sequence[float]
) -> np.ndarray:
    """(top, left, height, width) per row of draws, as shares of the image: float64 [b, 4]."""
    area = height * width * (scale[0] + draws[:, :_TRIES] * (scale[1] - scale[0]))
    aspect = np.exp(np.log(ratio[0]) + draws[:, _TRIES : 2 * _TRIES] * (np.log(ratio[1]) - np.log(ratio[0])))
    wide, high = np.sqrt(area * aspect), np.sqrt(area / aspect)
    fits = (wide <= width) & (high <= height)
    best = np.argmax(fits, axis=1)
    rows = np.arange(len(draws))
    wide, high = wide[rows, best], high[rows, best]
    centred = np.clip(width / height, ratio[0], ratio[1])
    none = ~fits.any(axis=1)
    wide = np.where(none, min(width, height * centred), wide) / width
    high = np.where(none, min(height, width / centred), high) / height
    top = np.where(none, 0.5, draws[:, -2]) * (1 - high)
    left = np.where(none, 0.5, draws[:, -1]) * (1 - wide)
    return np.stack([top, left, high, wide], axis=1)
