"""Assignment of samples to splits: by the split that the source states, otherwise by shares of every class.

Scores are only meaningful if no test picture was trained on, so equal pictures are assigned together.
Invariant: the assignment is a pure function of pictures, classes, shares and seed, on every machine and in any order of the
samples. Equal pictures are never in two splits.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from merge_service.errors import UserError
from workers.data.importing.found import TEST, TRAIN, VAL, refuse

FIRST = (TEST, VAL, TRAIN)
"""The order in which splits keep a shared picture, so that the test split stays complete."""


@dataclass(frozen=True)
class Item:
    """A sample to assign: digests of its displayed pixels (`pixels`) and its file (`content`), its class, and its stated split."""

    where: str
    pixels: str
    content: str
    label: str | None
    split: str | None


@dataclass(frozen=True)
class Shares:
    """Shares of each class, in [0, 1], that become val and test if the source has no such split; `seed` seeds the draw."""

    val: float = 0.1
    test: float = 0.2
    seed: int = 0

    @classmethod
    def usual(
        cls, roles: Sequence[str], val: float = 0.1, test: float | None = None, seed: int = 0
    ) -> "Shares":
        """Default shares: 10 % val and 20 % test. In a set that is only held out, and so never trained on, the rest is test."""
        rest = max(0.0, 1 - val) if tuple(roles) == ("held_out",) else 0.2
        return cls(val, rest if test is None else test, seed)

    def __post_init__(self) -> None:
        for name in ("val", "test"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} {getattr(self, name):g} must be a share from 0 to 1")
        if self.val + self.test > 1:
            raise UserError(f"--val {self.val:g} and --test {self.test:g} are more than the whole; lower one")


def divide(items: Sequence[Item], shares: Shares, drop: bool = False) -> tuple[list[str | None], list[str]]:
    """The split of each sample (None: left out), and notes for the user.

    With `drop`, a picture that occurs in several stated splits stays in one of them (test before val before train). Raises
    UserError for such a picture without `drop`, and if only some samples state a split.
    """
    stated = {item.split for item in items}
    if None in stated and len(stated) > 1:
        nowhere = next(item.where for item in items if item.split is None)
        raise UserError(
            f"{nowhere} states no split, but other samples do; state it for all samples or for none"
        )
    if None in stated:
        splits: list[str | None] = [TRAIN for _ in items]
        notes: list[str] = []
    else:
        splits, notes = _without_shared(items, drop)
    wanted = {
        name: share
        for name, share in ((TEST, shares.test), (VAL, shares.val))
        if name not in stated and share
    }
    if TRAIN in splits and wanted:
        _cut(items, splits, wanted, shares.seed)
        if None not in stated:
            notes.append(
                f"the source has no {' and no '.join(wanted)} split: cut from train (--{' 0 and --'.join(wanted)} 0 leaves it whole)"
            )
    return splits, notes


def _without_shared(items: Sequence[Item], drop: bool) -> tuple[list[str | None], list[str]]:
    """The stated splits, without pictures that also occur in another split. Raises UserError unless `drop`."""
    shown: dict[str, dict[str, Item]] = {}
    for item in items:
        shown.setdefault(item.pixels, {}).setdefault(item.split or "", item)
    shared = {pixels: places for pixels, places in shown.items() if len(places) > 1}
    if not shared:
        return [item.split for item in items], []
    if not drop:
        pairs = [
            " and ".join(f"{one.where} ({split})" for split, one in places.items())
            for places in shared.values()
        ]
        raise refuse(
            f"{len(pairs)} pictures are in more than one split", pairs,
            "remove one of each, or keep only the test (val) copy with --equal drop",
        )  # fmt: skip
    stays = {pixels: next(name for name in FIRST if name in places) for pixels, places in shared.items()}
    splits = [item.split if stays.get(item.pixels, item.split) == item.split else None for item in items]
    return splits, [f"{splits.count(None)} pictures were left out because another split has the same picture"]


def _cut(items: Sequence[Item], splits: list[str | None], wanted: Mapping[str, float], seed: int) -> None:
    """Move shares of every class from train to the wanted splits; groups of equal pictures are moved together."""
    groups: dict[str, list[int]] = {}
    for at, item in enumerate(items):
        if splits[at] == TRAIN:
            groups.setdefault(item.pixels, []).append(at)
    classes: dict[str, list[list[int]]] = {}
    for members in groups.values():
        first = min(members, key=lambda at: (items[at].label or "", items[at].content))
        classes.setdefault(items[first].label or "", []).append(members)
    for of_class in classes.values():
        drawn = iter(sorted(of_class, key=lambda members: _draw(seed, [items[at].content for at in members])))
        for name, count in _counts(len(of_class), wanted):
            for _ in range(count):
                for at in next(drawn):
                    splits[at] = name


def _draw(seed: int, contents: Sequence[str]) -> str:
    return hashlib.sha256(f"{seed} {min(contents)}".encode()).hexdigest()


def _counts(there: int, wanted: Mapping[str, float]) -> Iterator[tuple[str, int]]:
    """The number of groups of a class for each split: its share rounded half up, at least one if one remains for training."""
    left = there
    keep = 0 if sum(wanted.values()) >= 1 else 1
    for name, share in wanted.items():
        count = min(max(1, math.floor(share * there + 0.5)), max(0, left - keep))
        left -= count
        yield name, count
