"""Every text of a split is tokenised once, and a sample gets one of its own texts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from merge_service.errors import UserError
from tests.workers.data_helpers import PREPROCESS, job, words, write_coloured
from workers.data.batches import Batches
from workers.data.decode import Samples, load
from workers.data.prompts import prompts


def asked(seen: list[str]):
    def tokenizer(texts: list[str]) -> torch.Tensor:
        seen.extend(texts)
        return words(texts)

    return tokenizer


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    """Every fifth sample has captions of its own, the others a class."""
    found = load(write_coloured(tmp_path, "toys", 25), 8, tmp_path / "cache")
    return replace(found, captions=[(f"picture {n}", "one") if n % 5 == 0 else () for n in range(25)])


def test_sample_is_called_what_it_may_be_called_by_its_draw(samples: Samples) -> None:
    table, rows = prompts(samples, words), np.array([0, 1, 2, 5, 10, 24, 0])
    for draw in (0.0, 0.49, 0.5, 0.999):
        found = table.pick(rows, np.full(len(rows), draw))
        texts = [samples.texts(row) for row in rows]
        assert found.tolist() == words([each[int(draw * len(each))] for each in texts]).tolist()
    assert table.table.dtype == np.uint8, "the smallest type that holds the tokens"


def test_text_is_tokenised_once_whatever_is_trained(samples: Samples, tmp_path: Path) -> None:
    seen: list[str] = []
    tokenizer = asked(seen)
    assert prompts(samples, tokenizer) is prompts(samples, tokenizer) and not seen
    for draw in (0.0, 0.5, 0.0):
        prompts(samples, tokenizer).pick(np.arange(25), np.full(25, draw))
    assert len(seen) == len(set(seen)) == 3 * 2 + 5 + 1
    source = write_coloured(tmp_path, "more", 25)
    some = replace(source, classes=("more 0", "more 2"))
    for update in (source, some):
        seen.clear()
        for seed in (1, 2):
            batches = Batches(job(tmp_path / "cache", [update], seed=seed), tokenizer, PREPROCESS)
            for step in range(9):
                batches.share(step)
        assert sorted(seen) == sorted(
            f"{a} more {n}" for a in ("a", "the") for n in range(3) if update is source or n != 1
        )


def test_sample_without_a_text_is_refused_by_its_dataset(samples: Samples) -> None:
    with pytest.raises(UserError, match="dataset 'toys': sample 1 has neither"):
        prompts(replace(samples, templates=()), words)


def test_only_texts_that_are_picked_are_tokenised_and_larger_tokens_find_room(samples: Samples) -> None:
    seen: list[str] = []

    def tokenizer(texts: list[str]) -> torch.Tensor:
        seen.extend(texts)
        return torch.tensor([[len(seen), 70_000 if "picture" in text else 7] for text in texts])

    table = prompts(samples, tokenizer)
    small = table.pick(np.array([1, 1]), np.zeros(2))
    assert seen == [samples.texts(1)[0]] and small.tolist() == [[1, 7], [1, 7]]
    large = table.pick(np.array([1, 5]), np.zeros(2))
    assert seen[1:] == [samples.texts(5)[0]] and large.tolist() == [[1, 7], [2, 70_000]]
