"""Altered copies are reproducible, keep the label, and resemble their originals."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from merge_service.errors import UserError
from workers.data.decode import Samples
from workers.data.mixture import generator
from workers.data.variants import CHANGES, variants


def picture(number: int) -> np.ndarray:
    image = Image.new("RGB", (32, 32), "white")
    ImageDraw.Draw(image).rectangle((6 + number, 8, 20 + number, 24), outline="black", width=2)
    return np.asarray(image)


@pytest.fixture
def samples() -> Samples:
    images = np.stack([picture(number) for number in range(6)])
    return Samples(
        "boxes",
        "classification",
        images,
        np.array([0, 1] * 3),
        [()] * 6,
        ("a", "b"),
        ("a {c}",),
        np.arange(6),
    )


def test_copies_are_reproducible_and_differ_from_each_other(samples: Samples) -> None:
    one, two = (list(variants(samples, 2, list(CHANGES), seed=3, number=0)) for _ in range(2))
    assert len(one) == 12 and [sample.label for sample in one] == [0, 1] * 6
    assert all(np.array_equal(a.image, b.image) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one[0].image, one[6].image)
    assert not np.array_equal(one[0].image, next(variants(samples, 2, list(CHANGES), seed=4, number=0)).image)


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_change_keeps_size_and_most_of_the_picture(name: str) -> None:
    image = Image.fromarray(picture(3))
    for step in range(20):
        changed = CHANGES[name](image, generator(0, step))
        assert changed.size == (32, 32) and changed.mode == "RGB"
        assert (
            np.asarray(changed).std() > 0
            and abs(float(np.asarray(changed).mean()) - float(picture(3).mean())) < 90
        )


def test_blend_takes_from_the_same_class_only(samples: Samples) -> None:
    black = samples.images.copy()
    black[samples.labels == 1] = 0
    made = replace(samples, images=black)
    blended = [sample.image for sample in variants(made, 8, ["blend"], 0, 0) if sample.label == 0]
    assert any(not np.array_equal(image, black[0]) for image in blended)
    assert (
        min(np.percentile(image, 90) for image in blended) > 140
    )  # a black class-1 picture would have darkened the whole


def test_unknown_change_is_a_user_error(samples: Samples) -> None:
    with pytest.raises(UserError, match="no change 'sharpen'; choose from: shift"):
        next(variants(samples, 1, ["sharpen"], 0, 0))
