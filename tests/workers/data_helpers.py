"""Tiny synthetic datasets for the tests of data."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from workers.data.batches import Batches
from workers.data.writer import Sample, write_dataset
from workers.feed.device import Host
from workers.feed.pixels import Pixels
from workers.feed.ring import ready
from workers.jobs import EngineSpec, Source, TrainJob

PREPROCESS = {"size": 8, "mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}


def coloured(count: int, classes: int, first: int = 0, size: int = 8) -> list[Sample]:
    """Images whose every pixel is (number, label, 0), so that a test can tell them apart after any crop."""
    samples = []
    for number in range(first, first + count):
        image = np.zeros((size, size, 3), np.uint8)
        image[..., 0], image[..., 1] = number, number % classes
        samples.append(Sample(image, number % classes))
    return samples


def write_coloured(root: Path, name: str, count: int, classes: int = 3, first: int = 0) -> Source:
    names = [f"{name} {number}" for number in range(classes)]
    splits = {"train": coloured(count, classes, first), "test": coloured(classes * 2, classes, first)}
    write_dataset(
        root / name,
        kind="classification",
        classes=names,
        templates=["a {c}", "the {c}"],
        splits=splits,
        shard_samples=10,
    )
    return Source(str(root), name, "train")


def words(texts: list[str]) -> torch.Tensor:
    """A tokenizer for tests: the characters' codes, padded to 16."""
    return torch.tensor([[ord(letter) for letter in text[:16].ljust(16)] for text in texts])


def batch(batches: Batches, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch on the CPU: images float32 [b, 3, H, W] and the tokens of each, int64 [b, context]."""
    made = ready(batches, Pixels(PREPROCESS, Host.place), step)
    return made.images, made.tokens[made.places]


def job(
    cache: Path, update: Sequence[Source], *, buffer: Sequence[Source] = (), pretraining: Sequence[Source] = (),
    mixture: tuple[float, float, float] = (0, 1, 0), batch_size: int = 12, seed: int = 5,
) -> TrainJob:  # fmt: skip
    shares = dict(zip(("pretraining", "update", "buffer"), mixture, strict=True))
    recipe = {
        "batch_size": batch_size,
        "mixture": shares,
        "augment": {"scale": (0.9, 1.0), "ratio": (0.75, 1.333)},
    }
    return TrainJob(
        fingerprint="f", label="", t=1, task="toys", init="", base="", update=tuple(update), buffer=tuple(buffer),
        pretraining=tuple(pretraining), recipe=recipe, steps=4, seed=seed, engine=EngineSpec(), scratch="", checkpoint_every=0,
        out="", cache=str(cache),
    )  # fmt: skip
