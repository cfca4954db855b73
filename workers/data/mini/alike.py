"""Near-duplicates among the pictures of the mini suite, and a filter that keeps the first of each.

A test picture that resembles a training picture would measure memory. Likeness is the correlation of two grey pictures after 2x2 means:
256 numbers per picture, minus their mean. It ignores colour, brightness and contrast, so an emoji in two skin tones is one picture;
the means absorb shifts of a fraction of a pixel. Equal pixels have likeness 1. Two pictures are near-duplicates if their likeness
reaches the radius of their sets (the smaller of two).
Invariant: decisions rest on integers that are held exactly, so every machine finds the same near-duplicates.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workers.data.mini.pictures import SIZE, SPLITS, Group, samples_of

_SIDE = SIZE // 2
_BLOCK = 512
_DOUBT = 1e-5
"""A bound on the error of float32 products; likenesses this close to a radius are computed again, exactly."""
FAINTEST = 2.0
"""A standard deviation in grey levels; a picture below it is blank and is not used."""


@dataclass(frozen=True)
class Looks:
    """n pictures as vectors: `values` float32 [n, 256] (integers), `unit` float32 [n, 256] of length 1, `alike` [n] their radii."""

    values: np.ndarray
    unit: np.ndarray
    alike: np.ndarray

    def __len__(self) -> int:
        return len(self.alike)

    def __getitem__(self, rows: np.ndarray | slice) -> "Looks":
        return Looks(self.values[rows], self.unit[rows], self.alike[rows])

    def likeness(self, other: "Looks") -> np.ndarray:
        """float32 [n, m] correlations, with an error below 1e-5."""
        return self.unit @ other.unit.T

    def near(self, other: "Looks") -> np.ndarray:
        """bool [n, m]: whether two pictures are near-duplicates."""
        radius = np.minimum(self.alike[:, None], other.alike[None])
        excess = self.likeness(other) - radius
        near = excess >= 0
        rows, columns = np.nonzero(np.abs(excess) < _DOUBT)
        if len(rows):
            left, right = self.values[rows].astype(np.float64), other.values[columns].astype(np.float64)
            lengths = np.sqrt((left * left).sum(1)) * np.sqrt((right * right).sum(1))
            near[rows, columns] = (left * right).sum(1) >= radius[rows, columns].astype(np.float64) * lengths
        return near

    @property
    def blank(self) -> np.ndarray:
        """bool [n]: whether a picture is nearly uniform."""
        squares = (self.values.astype(np.float64) ** 2).sum(1)
        return squares < (FAINTEST * 4 * _SIDE**3) ** 2


def looks(images: Sequence[np.ndarray], alike: float) -> Looks:
    """The vectors of pictures uint8 [32, 32, 3] of one set, with its radius `alike`."""
    pixels = np.stack(images) if len(images) else np.zeros((0, SIZE, SIZE, 3), np.uint8)
    grey = (pixels.astype(np.int32) @ np.array([299, 587, 114], np.int32) + 500) // 1000
    sums = grey.reshape(-1, _SIDE, 2, _SIDE, 2).sum((2, 4)).reshape(len(grey), _SIDE**2)
    values = (_SIDE**2 * sums - sums.sum(1, keepdims=True)).astype(np.float64)
    unit = values / np.maximum(np.sqrt((values * values).sum(1, keepdims=True)), 1.0)
    return Looks(values.astype(np.float32), unit.astype(np.float32), np.full(len(grey), alike, np.float32))


def joined(parts: Sequence[Looks]) -> Looks:
    """The concatenation of several."""
    return Looks(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("values", "unit", "alike"))
    )


def distinct(groups: Sequence[Group], alike: float, taken: Looks) -> list[Group]:
    """The groups that conflict neither with each other nor with pictures in `taken`; of two that conflict, the first is kept.

    Two groups conflict if pictures of them are near-duplicates, or, if both state the same split, equal in pixels. A group is dropped
    if one of its pictures is blank, if two are equal, or if pictures of two of its parts are near-duplicates.
    """
    pictures = [sample.image for sample in samples_of(groups)]
    seen = looks(pictures, alike)
    equal = np.unique(
        [hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures], return_inverse=True
    )[1]
    sizes = [len(samples_of([group])) for group in groups]
    split = np.repeat([SPLITS.index(g.split) if g.split else -1 - n for n, g in enumerate(groups)], sizes)
    ends = np.cumsum([0, *sizes])

    def clash(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        together = split[left][:, None] == split[right][None]
        return (seen[left].near(seen[right]) & ~together) | (equal[left][:, None] == equal[right][None])

    kept: list[int] = []
    rows = np.zeros(0, np.int64)
    for first in range(0, len(groups), _BLOCK):
        last = min(first + _BLOCK, len(groups))
        here = np.arange(ends[first], ends[last])
        refused = seen[here].blank | seen[here].near(taken).any(1) | clash(here, rows).any(1)
        among, chosen = clash(here, here), np.zeros(len(here), bool)
        for number in range(first, last):
            mine = slice(ends[number] - ends[first], ends[number + 1] - ends[first])
            inside = among[mine, mine].sum() > sizes[number] or _parts_meet(groups[number], seen[here[mine]])
            if not (inside or refused[mine].any() or among[mine][:, chosen].any()):
                chosen[mine] = True
                kept.append(number)
        rows = np.concatenate([rows, here[chosen]])
    return [groups[number] for number in kept]


def _parts_meet(group: Group, seen: Looks) -> bool:
    part = np.repeat(np.arange(len(group.parts)), [len(samples) for samples in group.parts])
    return len(group.parts) > 1 and bool(seen.near(seen)[part[:, None] != part[None]].any())
