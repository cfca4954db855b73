"""Common values of the makers of the mini suite: picture size, rules for splits, and the form of a set before it is written.

A maker returns a `Draft` with more pictures than the suite needs: groups of pictures that belong together (an icon in its line
weights, an emoji in its skin tones), and a function that assigns groups to splits. `alike.py` then drops every group that resembles
an earlier one.
Invariant: a group that is kept is in one set, and each of its parts in one split.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
from PIL import Image

from workers.data.writer import Sample

SIZE = 32
SEED = 20241209
SPLITS = ("train", "val", "test")
Splits = dict[str, list[Sample]]


@dataclass(frozen=True)
class Group:
    """Pictures that stay together. `parts` may be in different splits, so they must not be near-duplicates; samples of one part may be.

    `kin` is the class that quotas count; `split` is the split, or "" if quotas decide it.
    """

    kin: int
    parts: tuple[tuple[Sample, ...], ...]
    split: str = ""


@dataclass(frozen=True)
class MiniDataset:
    """One dataset of the suite before it is written."""

    classes: tuple[str, ...]
    templates: tuple[str, ...]
    splits: Splits
    kind: str = "classification"


@dataclass(frozen=True)
class Draft:
    """One dataset before near-duplicates are dropped; `finish` makes the dataset from the remaining groups.

    `alike` is the likeness from which pictures are near-duplicates (see `alike.py`); the first of such groups is kept.
    """

    groups: list[Group]
    alike: float
    finish: Callable[[list[Group]], MiniDataset]


def by_quota(groups: list[Group], quotas: Mapping[str, int]) -> Splits:
    """`quotas[split]` groups of each class for each split; splits are filled in the order of `quotas`."""
    rows: dict[int, list[Group]] = defaultdict(list)
    for group in groups:
        rows[group.kin].append(group)
    splits: Splits = {split: [] for split in SPLITS if split in quotas}
    for kin in sorted(rows):
        left = iter(rows[kin])
        for split, quota in quotas.items():
            splits[split] += samples_of(islice(left, quota))
    return splits


def as_stated(groups: list[Group], quotas: Mapping[str, int] | None = None) -> Splits:
    """Each group in its stated split, with at most `quotas[split]` groups of a class."""
    splits: Splits = {split: [] for split in SPLITS}
    counts: Counter[tuple[str, int]] = Counter()
    for group in groups:
        counts[group.split, group.kin] += 1
        if quotas is None or counts[group.split, group.kin] <= quotas[group.split]:
            splits[group.split] += samples_of([group])
    return splits


def first_the_tests(groups: list[Group]) -> list[Group]:
    """Groups of test, then validation, then training, so that test groups are kept when near-duplicates are dropped."""
    return sorted(groups, key=lambda group: ("test", "val", "train").index(group.split))


def samples_of(groups: Iterable[Group]) -> list[Sample]:
    """All samples of groups, in order."""
    return [sample for group in groups for part in group.parts for sample in part]


def split_of(name: str, test: float = 0.24, val: float = 0.1) -> str:
    """The split of a name, by its hash: shares of about `test` and `val` of all names, and the rest for training."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return "test" if place < test else "val" if place < test + val else "train"


def generator(purpose: str) -> np.random.Generator:
    """A separate generator for each purpose, so that the size of one set does not change the pictures of another."""
    return np.random.default_rng([SEED, *purpose.encode()])


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
