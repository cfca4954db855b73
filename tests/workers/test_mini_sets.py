"""Each family of the suite on a few real pictures, and the splits that must not touch."""

import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from workers.data import mini_drawings, mini_fonts, mini_scans
from workers.data.mini_drawings import _drawings, _icon_names, _untoned, _without_tone
from workers.data.mini_packages import numpy_pickle
from workers.data.mini_pictures import MiniDataset
from workers.data.writer import Sample


def check(made: MiniDataset) -> None:
    """What every set owes: square RGB pictures that are not blank, and labels that its classes cover."""
    for samples in made.splits.values():
        assert samples and all(
            sample.image.shape == (32, 32, 3) and sample.image.dtype == np.uint8 for sample in samples
        )
        assert all(sample.image.std() > 0 for sample in samples)
        if made.kind == "classification":
            assert {sample.label for sample in samples} == set(range(len(made.classes)))
    assert all("{c}" in template for template in made.templates)


def test_scanned_sets_are_balanced_and_disjoint() -> None:
    made = mini_scans.animals(3, 2)
    check(made)
    assert [sample.label for sample in made.splits["train"]] == [
        label for label in range(10) for _ in range(3)
    ]
    train, test = ({sample.image.tobytes() for sample in made.splits[split]} for split in ("train", "test"))
    assert not train & test


def test_coarse_digits_have_a_test_split_only() -> None:
    made = mini_scans.digits8(2)
    check(made)
    assert list(made.splits) == ["test"] and made.classes == mini_scans.DIGITS
    assert made.templates == (mini_scans.DIGIT_PROMPT,)


def test_photographs_give_patches_of_every_class() -> None:
    made = mini_scans._photos(dict(list(mini_scans.PHOTOS_A.items())[:3]), "test", train=4, test=2)
    check(made)
    assert len(made.splits["train"]) == 12 and len(made.splits["test"]) == 6


def test_the_two_photo_sets_share_no_photograph() -> None:
    assert not set(mini_scans.PHOTOS_A) & set(mini_scans.PHOTOS_B)


def test_scripts_keep_test_letters_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, float]] = []

    def note(face: object, letter: str) -> np.ndarray:
        drawn.append((letter, face.get_variation_axes() and 0))
        return np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)

    monkeypatch.setattr(mini_fonts, "SCRIPTS", {"Greek": "GREEK", "Thai": "THAI CHARACTER"})
    monkeypatch.setattr(mini_fonts, "_draw", note)
    made = mini_fonts.scripts(train=5, test=3)
    assert len(made.splits["train"]) == 2 * 5 * 4 and len(made.splits["test"]) == 2 * 3 * 2
    letters = [letter for letter, _ in drawn]
    greek_test, greek_train = set(letters[:6]), set(letters[6:26])
    assert len(greek_test) == 3 and len(greek_train) == 5 and not greek_test & greek_train


def test_letters_of_a_typeface_cover_the_alphabet() -> None:
    face = mini_fonts._typeface(mini_fonts.find_one("matplotlib", mini_fonts._TRAIN_FACES), None)
    samples = mini_fonts._alphabet(face)
    check(MiniDataset(tuple(map(chr, range(65, 91))), ("{c}",), {"train": samples}))
    assert len(samples) == 52


def test_training_and_test_typefaces_are_of_different_families() -> None:
    names = [
        {Path(name).name for name in mini_fonts.find("matplotlib", faces)}
        for faces in (mini_fonts._TRAIN_FACES, mini_fonts._TEST_FACES)
    ]
    assert len(names[0]) == 12 and len(names[1]) == 10
    assert all(name.startswith("DejaVu") for name in names[0]) and not any(
        name.startswith("DejaVu") for name in names[1]
    )


def test_icons_are_drawn_in_every_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mini_drawings, "_ICONS", 3)
    monkeypatch.setattr(mini_drawings, "_STYLED", (2, 2))
    icons, styles = mini_drawings.icons(), mini_drawings.icon_style()
    check(icons)
    check(styles)
    assert [len(icons.splits[split]) for split in ("train", "test")] == [12, 6]
    assert len({sample.image.tobytes() for sample in icons.splits["train"] + icons.splits["test"]}) == 18


def test_icons_whose_style_is_learned_are_not_those_whose_names_were_taught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        mini_drawings, "_icon", lambda name, style: asked.append(name) or np.zeros((32, 32, 3), np.uint8)
    )
    mini_drawings.icons()
    taught = set(asked)
    asked.clear()
    made = mini_drawings.icon_style()
    train, test = set(asked[: len(made.splits["train"])]), set(asked[len(made.splits["train"]) :])
    assert len(taught) == 600 and len(train) == 300 and len(test) == 80
    assert not taught & (train | test) and not train & test and len(_icon_names()) >= 1500


def test_emoji_held_back_from_one_set_are_held_back_from_all(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {path: number for number, path in enumerate(_drawings().values())}
    codes = list(_drawings())
    monkeypatch.setattr(
        mini_drawings,
        "_emoji",
        lambda path: np.full((1, 1, 3), [numbers[path] // 256, numbers[path] % 256, 0], np.uint8),
    )

    def groups(samples: list[Sample]) -> set[str]:
        return {
            _without_tone(codes[int(sample.image[0, 0, 0]) * 256 + int(sample.image[0, 0, 1])])
            for sample in samples
        }

    made = [mini_drawings.emoji_names(), mini_drawings.emoji_group(), mini_drawings.skin_tone()]
    train, test = (set().union(*(groups(part.splits[split]) for part in made)) for split in ("train", "test"))
    assert train and test and not train & test
    assert 0.15 < len(test) / (len(train) + len(test)) < 0.25
    for part in made[1:]:
        assert {sample.label for sample in part.splits["test"]} == set(range(len(part.classes)))


def test_emoji_have_distinct_names_and_real_pictures() -> None:
    entries = list(_untoned())
    assert len({entry["name"] for _, _, entry in entries}) == len(entries) > 1800
    for _, path, _ in entries[::400]:
        assert mini_drawings._emoji(path).std() > 5


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("true",)


def test_pickle_that_asks_for_anything_but_numpy_is_refused(tmp_path: Path) -> None:
    for name, value in (("good", np.arange(6).reshape(2, 3)), ("evil", Evil()), ("list", [np.float64(1)])):
        with gzip.open(tmp_path / name, "wb") as stream:
            pickle.dump(value, stream)
    assert np.array_equal(numpy_pickle(tmp_path / "good"), np.arange(6).reshape(2, 3))
    for name in ("evil", "list"):
        with pytest.raises(pickle.UnpicklingError, match="only numpy arrays"):
            numpy_pickle(tmp_path / name)
