"""What the makers of the mini suite share: one picture size, one split rule, one shape of result.

Invariant: no group (an emoji in all its tones, an icon in all its weights, a letter in all its typefaces) has pictures in both
the training and the test split of a set, and the split depends on the group's name only.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from workers.data.writer import Sample

SIZE = 32
SEED = 20241209


@dataclass(frozen=True)
class MiniDataset:
    """One dataset of the suite before it is written."""

    classes: tuple[str, ...]
    templates: tuple[str, ...]
    splits: dict[str, list[Sample]]
    kind: str = "classification"


def generator(purpose: str) -> np.random.Generator:
    """A generator of its own for each purpose, so that one set's size does not change another's pictures."""
    return np.random.default_rng([SEED, *purpose.encode()])


def held_back(group: str, share: float) -> bool:
    """Whether a group belongs to the test split; about `share` of all groups do."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:4], "big") < share * 2**32


def shuffled(items: list[str], purpose: str) -> list[str]:
    """The items in a fixed random order."""
    return [items[place] for place in generator(purpose).permutation(len(items))]


def shrink(image: Image.Image) -> np.ndarray:
    """uint8 [SIZE, SIZE, 3] of a square image of any mode; transparency becomes white."""
    if image.mode in ("RGBA", "LA", "P"):
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        paper.alpha_composite(image)
        image = paper
    return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def grey(values: np.ndarray) -> np.ndarray:
    """uint8 [SIZE, SIZE, 3] of a small grey picture [H, W] in 0..255."""
    image = Image.fromarray(values.astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(image.convert("RGB"))
