"""Near-duplicates are found by shape, and only the first of them is kept."""

import numpy as np
import pytest

from workers.data.mini import alike
from workers.data.mini.alike import distinct, joined, looks
from workers.data.mini.pictures import Group
from workers.data.writer import Sample

RADIUS = 0.95
NOTHING = looks([], 1.0)


def picture(seed: int) -> np.ndarray:
    """Blocks of 4x4 pixels in random greys: two of them are nothing alike."""
    coarse = np.random.default_rng(seed).integers(40, 200, (8, 8))
    return np.repeat(np.kron(coarse, np.ones((4, 4), int))[..., None], 3, axis=2).astype(np.uint8)


def close_to(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed + 1000).integers(-12, 13, (32, 32, 1))
    return (picture(seed) + noise).clip(0, 255).astype(np.uint8)


def group(*images: np.ndarray, split: str = "", parts: int = 1) -> Group:
    samples = [Sample(image, 0) for image in images]
    return Group(0, tuple(tuple(samples[part::parts]) for part in range(parts)), split)


def kept(groups: list[Group], taken: alike.Looks = NOTHING) -> list[int]:
    numbers = {id(each): number for number, each in enumerate(groups)}
    return [numbers[id(each)] for each in distinct(groups, RADIUS, taken)]


@pytest.mark.parametrize(
    "other",
    [close_to(1), picture(1) // 2, 255 - (255 - picture(1)) // 2, picture(1) * np.array([1, 1, 0], np.uint8)],
    ids=["noisy", "darker", "paler", "yellow"],
)
def test_noise_light_and_colour_do_not_hide_a_near_duplicate(other: np.ndarray) -> None:
    assert looks([picture(1)], RADIUS).near(looks([other], RADIUS)).all()


def test_other_shapes_and_inverted_ones_are_not_alike() -> None:
    others = looks([picture(2), 255 - picture(1), np.roll(picture(1), 8, 1)], RADIUS)
    assert not looks([picture(1)], RADIUS).near(others).any()


def test_smaller_radius_of_two_sets_decides() -> None:
    one, other = picture(1), close_to(1)
    likeness = float(looks([one], 1.0).likeness(looks([other], 1.0))[0, 0])
    strict, lax = likeness - 0.01, likeness + 0.01
    found = [looks([one], a).near(looks([other], b)).item() for a in (strict, lax) for b in (strict, lax)]
    assert found == [True, True, True, False]


def test_likeness_at_the_radius_is_decided_exactly() -> None:
    one, other = looks([picture(1)], 1.0), looks([close_to(1)], 1.0)
    left, right = one.values[0].astype(float), other.values[0].astype(float)
    exact = left @ right / np.sqrt(left @ left) / np.sqrt(right @ right)
    for radius in (np.float32(exact), np.nextafter(np.float32(exact), np.float32(2))):
        found = looks([picture(1)], float(radius)).near(looks([close_to(1)], float(radius)))
        assert found.item() == (exact >= radius)


def test_first_of_those_that_look_alike_is_kept() -> None:
    groups = [group(picture(1)), group(picture(2)), group(close_to(1)), group(close_to(2)), group(picture(3))]
    assert kept(groups) == [0, 1, 4]
    assert kept(groups, taken=looks([close_to(3)], RADIUS)) == [0, 1]


def test_blocks_do_not_change_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [group(picture(seed % 7) if seed < 7 else close_to(seed % 7)) for seed in range(20)]
    whole = kept(groups)
    monkeypatch.setattr(alike, "_BLOCK", 3)
    assert kept(groups) == whole == list(range(7))


def test_groups_of_one_stated_split_may_look_alike_but_not_be_equal() -> None:
    groups = [
        group(picture(1), split="train"), group(close_to(1), split="train"), group(picture(1), split="train"),
        group(close_to(1), split="test"),
    ]  # fmt: skip
    assert kept(groups) == [0, 1]


def test_group_is_refused_whole_for_one_bad_picture() -> None:
    blank = np.full((32, 32, 3), 255, np.uint8)
    bad = [group(picture(2), blank), group(picture(3), picture(3)), group(picture(4), close_to(1))]
    assert kept([group(picture(1)), *bad]) == [0]


def test_parts_of_a_group_have_to_differ_and_samples_of_one_part_need_not() -> None:
    together, apart = group(picture(1), close_to(1)), group(picture(1), close_to(1), parts=2)
    assert kept([together]) == [0] and kept([apart]) == []
    assert kept([group(picture(1), picture(2), parts=2)]) == [0]


def test_joined_looks_hold_all_pictures() -> None:
    both = joined([looks([picture(1)], 0.9), looks([picture(2), picture(3)], 0.8)])
    assert len(both) == 3 and both.alike.tolist() == np.float32([0.9, 0.8, 0.8]).tolist()
