"""Search for pictures that two splits of the mini suite share: equal ones and near-duplicates (see `alike.py`).

It checks the written shards independently of the code that makes the sets.
Invariant: nothing is written, and no knowledge of the makers is used.
"""

import hashlib
import itertools
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from merge_service.errors import UserError
from workers.data.manifest import describe, folder, read_suite
from workers.data.mini.alike import Looks, looks
from workers.data.mini.pictures import SPLITS

LOOSE = 0.9
"""A likeness below every radius, for which pairs are counted as well."""
_BLOCK = 1024


@dataclass(frozen=True)
class Split:
    """The n pictures of one written split; `key` is (dataset, split). Pictures with equal pixels have equal `codes`."""

    key: tuple[str, str]
    looks: Looks
    codes: tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """What `right` (`pictures` pictures) shares with `left`: the number of its pictures that have an equal picture there, a
    near-duplicate, or a likeness of `LOOSE` or more, and the greatest likeness. If both are the same split, `equal` counts copies of an
    earlier picture."""

    left: tuple[str, str]
    right: tuple[str, str]
    pictures: int
    equal: int
    near: int = 0
    loose: int = 0
    closest: float = 0.0


def scan(root: str | Path) -> list[Pair]:
    """All pairs of splits, within and across datasets. Raises UserError if `root` has no suite, or its suite states no radii."""
    suite = read_suite(root)
    radii = suite.get("alike")
    if not isinstance(radii, dict):
        raise UserError(f"{root}: suite.json has no `alike`, the radius of near-duplicates of each dataset")
    splits = [
        read_split(root, name, split, radius)
        for name, radius in radii.items()
        for split in SPLITS
        if split in describe(root, name).splits
    ]
    copies = [Pair(s.key, s.key, len(s.codes), len(s.codes) - len(set(s.codes))) for s in splits]
    return copies + [_compare(left, right) for left, right in itertools.combinations(splits, 2)]


def read_split(root: str | Path, dataset: str, split: str, radius: float) -> Split:
    """The pictures of one split, in order."""
    images = []
    for shard in describe(root, dataset).splits[split].shards:
        with tarfile.open(folder(root, dataset) / split / shard.file) as archive:
            for member in archive:
                if member.name.endswith(".png") and (stream := archive.extractfile(member)) is not None:
                    with Image.open(stream) as image:
                        images.append(np.asarray(image.convert("RGB")))
    codes = tuple(hashlib.sha256(image.tobytes()).hexdigest() for image in images)
    return Split((dataset, split), looks(images, radius), codes)


def table(pairs: Sequence[Pair]) -> str:
    """A Markdown table: one line per dataset, then one for pairs of different datasets."""
    lines = [
        f"| dataset | copies within a split | equal | near-duplicates | {LOOSE:.2g} or more: test of train | val of train | test of val |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(pair.left[0] for pair in pairs):
        mine = [pair for pair in pairs if pair.left[0] == pair.right[0] == name]
        between = {(pair.left[1], pair.right[1]): pair for pair in mine if pair.left != pair.right}
        loose = [
            f"{100 * pair.loose / pair.pictures:.1f} %, at most {pair.closest:.3f}"
            if (pair := between.get(key))
            else "-"
            for key in (("train", "test"), ("train", "val"), ("val", "test"))
        ]
        copies = sum(pair.equal for pair in mine if pair.left == pair.right)
        equal, near = (sum(getattr(pair, what) for pair in between.values()) for what in ("equal", "near"))
        lines.append(f"| {' | '.join([name, str(copies), str(equal), str(near), *loose])} |")
    across = [pair for pair in pairs if pair.left[0] != pair.right[0]]
    if across:
        nearest = max(across, key=lambda pair: pair.closest)
        equal, near, loose_ones = (
            sum(getattr(pair, what) for pair in across) for what in ("equal", "near", "loose")
        )
        where = f"{'/'.join(nearest.left)} and {'/'.join(nearest.right)} come nearest, {nearest.closest:.3f}"
        lines.append(
            f"| any two datasets | - | {equal} | {near} | {loose_ones} pairs of a picture and a split; {where} | | |"
        )
    return "\n".join(lines)


def _compare(left: Split, right: Split) -> Pair:
    there = set(left.codes)
    equal = sum(code in there for code in right.codes)
    near, closest = np.zeros(len(right.codes), bool), np.zeros(len(right.codes), np.float32)
    for first in range(0, len(right.codes), _BLOCK):
        rows = slice(first, first + _BLOCK)
        near[rows] = right.looks[rows].near(left.looks).any(1)
        closest[rows] = right.looks[rows].likeness(left.looks).max(1, initial=0)
    return Pair(
        left.key, right.key, len(right.codes), equal, int(near.sum()), int((closest >= LOOSE).sum()),
        float(closest.max(initial=0)),
    )  # fmt: skip
