"""Each family of the suite on a few real pictures, and the separation of its splits."""

import gzip
import os
import pickle
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from workers.data.mini import drawings, emoji, fonts, scans, suite
from workers.data.mini.alike import distinct, looks
from workers.data.mini.packages import find, find_one, numpy_pickle
from workers.data.mini.pictures import Draft, Group, MiniDataset, as_stated, by_quota, samples_of, split_of
from workers.data.mini.words import is_owned
from workers.data.writer import Sample

BLACK = np.zeros((32, 32, 3), np.uint8)


def finish(draft: Draft) -> MiniDataset:
    """The dataset of a draft whose groups may all be used together."""
    return draft.finish(draft.groups)


def check(made: MiniDataset) -> None:
    """What every set owes: square RGB pictures that are not blank, and labels that its classes cover."""
    for samples in made.splits.values():
        assert samples and all(
            sample.image.shape == (32, 32, 3) and sample.image.dtype == np.uint8 for sample in samples
        )
        assert all(sample.image.std() > 0 for sample in samples)
        if made.kind == "classification":
            assert {sample.label for sample in samples} <= set(range(len(made.classes)))
    assert all("{c}" in template for template in made.templates)


def test_quota_fills_splits_in_its_order_for_each_class() -> None:
    groups = [Group(kin, ((Sample(BLACK, kin),) * 2,)) for kin in (1, 0) for _ in range(4)]
    made = by_quota(groups, {"test": 1, "val": 1, "train": 5})
    assert {split: Counter(sample.label for sample in samples) for split, samples in made.items()} == {
        "train": {0: 4, 1: 4}, "val": {0: 2, 1: 2}, "test": {0: 2, 1: 2},
    }  # fmt: skip
    assert list(made) == ["train", "val", "test"]


def test_stated_splits_are_kept_and_cut_at_the_quota() -> None:
    groups = [Group(kin, ((Sample(BLACK, kin),),), split) for split in ("val", "train") for kin in (0, 0, 1)]
    made = as_stated(groups, {"train": 1, "val": 2, "test": 1})
    assert [len(made[split]) for split in ("train", "val", "test")] == [2, 3, 0]
    assert len(as_stated(groups)["train"]) == 3


def test_split_of_a_name_has_its_share_and_never_changes() -> None:
    counts = Counter(split_of(f"name {number}") for number in range(4000))
    assert 0.22 < counts["test"] / 4000 < 0.26 and 0.08 < counts["val"] / 4000 < 0.12
    assert [split_of(f"emoji {code}") for code in ("1f600", "1f44b", "2615")] == ["train", "val", "train"]


def test_scanned_sets_are_balanced_and_the_digits_of_other_hands_have_no_training_split() -> None:
    for draft in (scans.animals(), scans.mnist()):
        made = finish(draft)
        check(made)
        for samples in made.splits.values():
            assert len(set(Counter(sample.label for sample in samples).values())) == 1
    made = finish(scans.digits8())
    check(made)
    assert list(made.splits) == ["val", "test"] and made.classes == scans.DIGITS
    assert made.templates == (scans.DIGIT_PROMPT,)


def test_regions_of_a_photograph_do_not_touch() -> None:
    spans = sorted(scans.REGIONS.values())
    assert set(scans.REGIONS) == {"train", "val", "test"}
    assert all(left[1] < right[0] for left, right in pairwise(spans))


def test_patches_come_from_the_region_of_their_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradient(path: object) -> scans.Image.Image:
        across = np.broadcast_to(np.linspace(0, 255, 400), (300, 400))
        return scans.Image.fromarray(across.astype(np.uint8))

    monkeypatch.setattr(scans.Image, "open", gradient)
    draft = scans._photos({"brick.png": "a", "page.png": "b"}, "test")
    for group in draft.groups:
        left, right = (255 * edge for edge in scans.REGIONS[group.split])
        (sample,) = samples_of([group])
        assert left - 2 <= sample.image.min() and sample.image.max() <= right + 2, group.split
    check(finish(draft))


def test_the_two_photo_sets_share_no_photograph() -> None:
    assert not set(scans.PHOTOS_A) & set(scans.PHOTOS_B)


def test_letter_of_a_script_is_in_one_split_in_all_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "SCRIPTS", {"Greek": "GREEK", "Thai": "THAI CHARACTER"})
    draft = fonts.scripts()
    assert {len(samples_of([group])) for group in draft.groups} == {3}
    made = draft.finish(distinct(draft.groups, draft.alike, looks([], 1.0)))
    check(made)
    assert {split: len(samples) for split, samples in made.splits.items()} == {
        "train": 168,
        "val": 24,
        "test": 48,
    }


def test_weights_of_a_typeface_draw_different_pictures() -> None:
    for family in ("", "Thai", "Emoji"):
        path = find_one("manimgx-fonts", rf"manimgx_fonts/Noto(Sans)?{family}\[wght\]\.ttf")
        faces = [fonts.typeface(path, weight) for weight in fonts.weights(path)]
        sign = {"": "g", "Thai": "\u0e01", "Emoji": "\u2615"}[family]
        assert len({fonts.draw(face, sign).tobytes() for face in faces}) == len(faces) == 3


def test_letters_of_a_typeface_cover_the_alphabet() -> None:
    path = find_one("matplotlib", fonts._FAMILIES["train"])
    groups = fonts._alphabet(fonts.typeface(path, None), "train")
    assert len(groups) == 52 and {group.kin for group in groups} == set(range(26))
    assert len({sample.image.tobytes() for sample in samples_of(groups)}) == 52


def test_typefaces_of_the_splits_are_of_different_families() -> None:
    names = {
        split: {Path(name).stem for name in find("matplotlib", faces)}
        for split, faces in fonts._FAMILIES.items()
    }
    assert {split: len(found) for split, found in names.items()} == {"train": 8, "val": 4, "test": 10}
    assert all(name.startswith("DejaVuSans") for name in names["train"])
    assert all(name.startswith("DejaVuSerif") for name in names["val"])
    assert not any(name.startswith(("DejaVu", "NotoSans")) for name in names["test"])


def test_icons_are_taught_as_outlines_and_tested_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawings, "_NAMED", 6)
    monkeypatch.setattr(drawings, "_FILLED_IN", {"test": 2, "val": 1, "train": 2})
    draft = drawings.icons()
    made = draft.finish(draft.groups[1:])
    check(made)
    assert {split: [sample.label for sample in samples] for split, samples in made.splits.items()} == {
        "train": [0] * 4 + [1] * 4 + [2] * 4 + [3] * 5 + [4] * 5, "val": [2], "test": [0, 1],
    }  # fmt: skip
    assert len({sample.image.tobytes() for samples in made.splits.values() for sample in samples}) == 25
    names = [name.replace("-", " ") for name in drawings._icon_names()[1:6]]
    assert made.classes == tuple(names)


def test_icons_whose_style_is_learned_are_not_those_whose_names_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(drawings, "_icon", lambda name, style: asked.append(name) or BLACK)
    drawings.icons()
    named = set(asked)
    asked.clear()
    drawings.icon_style()
    assert len(named) == 850 and len(set(asked)) == 470 and not named & set(asked)


def test_names_that_never_replayed_sets_own_are_in_no_set_of_an_experts_training() -> None:
    assert all(map(is_owned, ("cat", "number-two", "keycap: 7", "two hearts", "polar bear", "bears", "one")))
    assert not any(map(is_owned, ("caterpillar", "cowboy", "stone", "lightning", "tent", "pencil")))
    icons, names = drawings._icon_names(), [entry["name"] for _, entry in emoji._named()]
    assert len(icons) > 1400 and len(names) > 1500 and not any(map(is_owned, [*icons, *names]))
    for taught in (scans.PHOTOS_A, scans.PHOTOS_B):
        assert not any(map(is_owned, taught.values()))


def test_emoji_is_in_one_split_in_every_set_and_tone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    codes = {path: code for code, path in emoji._drawings().items()}
    monkeypatch.setattr(emoji, "_emoji", lambda path: asked.append(codes[path]) or BLACK)
    split_of_code: dict[str, str] = {}
    for maker in (emoji.emoji_group, emoji.skin_tone):
        asked.clear()
        draft = maker()
        splits = Counter(group.split for group in draft.groups)
        assert set(splits) == {"train", "val", "test"} and splits["test"] > 60
        for code in asked:
            plain = emoji._without_tone(code)
            assert (plain in emoji._toned()) == (maker is emoji.skin_tone)
            split_of_code[plain] = emoji._split(plain)
    assert len(split_of_code) > 1600


def test_emoji_names_are_taught_in_two_line_weights_and_tested_in_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    some = {code: emoji._database()[code] for code in list(emoji._database())[:60]}
    monkeypatch.setattr(emoji, "_database", lambda: some)
    draft = emoji.emoji_names()
    check(MiniDataset((), (), {"all": samples_of(draft.groups)}, kind="retrieval"))
    assert {(group.split, len(samples_of([group]))) for group in draft.groups} == {
        ("train", 2), ("val", 1), ("test", 1),
    }  # fmt: skip
    assert [group.split for group in draft.groups] == sorted(
        (group.split for group in draft.groups), key=("test", "val", "train").index
    )


def test_roles_and_groups_of_the_suite_fit_together() -> None:
    roles, groups = suite.ROLES, suite.ZERO_SHOT_GROUPS
    assert {name for names in roles.values() for name in names} == set(suite.MAKERS)
    assert sorted(groups["replayed"] + groups["never_replayed"]) == sorted(roles["held_out"])
    assert groups["replayed"] == roles["pretraining"]
    trained = set(roles["pretraining"]) | set(roles["adaptation"])
    assert not trained & set(groups["never_replayed"]) and not set(roles["adaptation"]) & set(
        roles["held_out"]
    )


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
