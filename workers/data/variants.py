"""Altered copies of small pictures, so that a base learns the meaning of a name and not one drawing of it.

The copies are written as an ordinary dataset before training, so they can be inspected and training needs no augmentation of its own.
Invariant: a copy depends on (seed, dataset, copy, sample) only.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from merge_service.errors import UserError
from workers.data.decode import Samples
from workers.data.mixture import generator
from workers.data.writer import Sample

Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def variants(
    samples: Samples, copies: int, changes: Sequence[str], seed: int, number: int
) -> Iterator[Sample]:
    """`copies` altered copies of every sample; `number` is the place of the dataset in its pool and enters the seed.

    `changes` are names of `CHANGES`, applied in their order, or `blend`, which puts a paler picture of the same class under
    the sample. Raises UserError for an unknown name.
    """
    for name in changes:
        if name not in CHANGES and name != "blend":
            raise UserError(
                f"pool: there is no change {name!r}; choose from: {', '.join((*CHANGES, 'blend'))}"
            )
    mates = {label: np.flatnonzero(samples.labels == label) for label in np.unique(samples.labels)}
    for copy in range(copies):
        for row in range(len(samples)):
            draw = generator(seed, number, copy, row)
            image = Image.fromarray(np.asarray(samples.images[row]))
            if "blend" in changes and draw.random() < 0.4:
                image = _blend(image, samples.images[draw.choice(mates[samples.labels[row]])], draw)
            for name in changes:
                image = CHANGES[name](image, draw) if name in CHANGES else image
            label = int(samples.labels[row])
            yield Sample(np.asarray(image), None if label < 0 else label, samples.captions[row])


def shift(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    """Move, rotate and scale slightly; the uncovered border gets the colour of the corner."""
    angle, size = np.deg2rad(draw.normal(0, 5)), np.exp(draw.normal(0, 0.08))
    dx, dy = draw.normal(0, 1.2, 2)
    cos, sin, middle = np.cos(angle) / size, np.sin(angle) / size, (image.width - 1) / 2
    matrix = (
        cos,
        sin,
        middle - cos * (middle + dx) - sin * (middle + dy),
        -sin,
        cos,
        middle + sin * (middle + dx) - cos * (middle + dy),
    )
    corner = image.getpixel((0, 0))
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=corner
    )


def zoom(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    """In half of the cases, enlarge the middle by up to a half."""
    if draw.random() < 0.5:
        return image
    margin = image.width * (1 - 1 / draw.uniform(1, 1.5)) / 2
    box = (margin, margin, image.width - margin, image.height - margin)
    return image.resize(image.size, Image.Resampling.BICUBIC, box=box)


def coarsen(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    """In half of the cases, remove detail: shrink to between a quarter and two thirds, and enlarge again."""
    if draw.random() < 0.5:
        return image
    side = int(draw.integers(image.width // 4, 2 * image.width // 3))
    return image.resize((side, side), Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)


def thicken(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    """Thicken or thin strokes by a fraction of a pixel."""
    change = (ImageFilter.MinFilter(3), ImageFilter.MaxFilter(3))[int(draw.integers(2))]
    return Image.blend(image, image.filter(change), float(draw.beta(0.7, 1.3)))


def blur(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    """In a third of the cases, blur."""
    return (
        image.filter(ImageFilter.GaussianBlur(float(draw.uniform(0.3, 1.2))))
        if draw.random() < 1 / 3
        else image
    )


def light(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    """Change brightness, contrast and saturation."""
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhancer(image).enhance(float(np.exp(draw.normal(0, 0.15))))
    return image


def turn(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    """One of the eight rotations and reflections of a square picture, for textures, which have no upright position."""
    steps = (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE)
    for step, wanted in zip(steps, draw.random(3) < 0.5, strict=True):
        image = image.transpose(step) if wanted else image
    return image


CHANGES: dict[str, Change] = {
    "shift": shift, "zoom": zoom, "coarsen": coarsen, "thicken": thicken, "blur": blur, "light": light, "turn": turn,
}  # fmt: skip


def _blend(image: Image.Image, mate: np.ndarray, draw: np.random.Generator) -> Image.Image:
    pale = 255 - draw.uniform(0.1, 0.4) * (255.0 - mate)
    return Image.fromarray(np.minimum(np.asarray(image), pale).astype(np.uint8))
