"""Classes whose prompts have equal tokens are found, with the reason."""

import pytest
import torch
from open_clip import SimpleTokenizer

from workers.scoring.prompts import alike, is_cut

CLIP = SimpleTokenizer(context_length=16)


def tokens(texts: list[str]) -> torch.Tensor:
    return CLIP(texts)  # type: ignore[no-any-return]


LONG = "an object that was photographed in the studio by the team of the museum in spring and is a "


@pytest.mark.parametrize(
    ("classes", "groups"),
    [
        (["A", "a", "b"], [["A", "a"]]),
        (["a", "b", "A", "B", "c"], [["a", "A"], ["b", "B"]]),
        ([LONG + name for name in ("cat", "dog", "hen")], [[LONG + name for name in ("cat", "dog", "hen")]]),
        (["ice  cream", "ice cream"], [["ice  cream", "ice cream"]]),
        (["fish &amp; chips", "fish & chips"], [["fish &amp; chips", "fish & chips"]]),
        (["crane", "crane", "cranes"], []),
        ([], []),
    ],
)
def test_names_that_the_tokenizer_cannot_keep_apart_are_grouped(
    classes: list[str], groups: list[list[str]]
) -> None:
    assert alike(tokens, classes, ["a photo of a {c}."]) == groups


def test_names_that_one_prompt_keeps_apart_are_not_alike() -> None:
    names = ["the big red cat", "the big red dog"]
    longest = "one two three four five six seven eight nine ten eleven {c}"
    assert alike(tokens, names, [longest]) == [names]
    assert alike(tokens, names, [longest, "a {c}"]) == []


def test_names_alike_for_the_length_of_the_context_are_told_from_names_that_are_written_alike() -> None:
    assert is_cut(tokens, [f"{LONG} cat", f"{LONG} dog"]) and is_cut(tokens, ["big cat", "big dog"])
    assert not is_cut(tokens, ["A", "a"])
