"""Pictures that datasets of one root share: training pictures of one that are test or val pictures of another.

A score on such a picture is no score on unseen data. Each imported dataset keeps a digest of every picture, so that a later import finds
its copies without reading shards.
Invariant: digests are of displayed pixels, so a copy in another format is found. Datasets that were not imported have no digests and are
not compared.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from merge_service.errors import UserError
from workers.data.importing.found import TEST, TRAIN, VAL

FOLDER = "pictures"
"""The folder of a dataset that holds the digests, SPLIT.npy: uint64 [N], sorted."""
Digests = np.ndarray


def digests(pixels: Iterable[str]) -> Digests:
    """The first 64 bits of each hexadecimal sha256, sorted: two of a million pictures agree by chance once in ten million roots."""
    return np.array(sorted(int(one[:16], 16) for one in pixels), np.uint64)


def keep(home: Path, pictures: Mapping[str, Digests]) -> None:
    """Write the digests of a dataset, by split."""
    (home / FOLDER).mkdir()
    for split, found in pictures.items():
        np.save(home / FOLDER / f"{split}.npy", found, allow_pickle=False)


def notes(root: Path, name: str, pictures: Mapping[str, Digests]) -> list[str]:
    """A sentence for each two splits, of `name` and of another dataset of the root, that share pictures of which one trains.

    Raises UserError for digests that cannot be read.
    """
    said = []
    for other, theirs, kept in _others(root, name):
        for mine, found in pictures.items():
            count = int(np.isin(found, kept).sum()) if (mine == TRAIN) != (theirs == TRAIN) else 0
            if count:
                places = ((name, mine), (other, theirs))
                (trained, train), (scored, split) = places if mine == TRAIN else places[::-1]
                said.append(
                    f"{count:,} pictures are in both {trained}/{train} and {scored}/{split}: in a study that trains on {trained}, the "
                    f"score on {scored} is partly of pictures that were trained on"
                )
    return said


def _others(root: Path, name: str) -> Iterator[tuple[str, str, Digests]]:
    for file in sorted(root.glob(f"*/{FOLDER}/*.npy")):
        other, split = file.parent.parent.name, file.stem
        if other == name or split not in (TRAIN, VAL, TEST):
            continue
        try:
            kept = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{file} is damaged ({error}); without {file.parent}, {other} is not compared with other datasets"
            ) from None
        yield other, split, kept
