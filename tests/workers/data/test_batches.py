"""A batch depends on (seed, step, rank) only, and the shares of all ranks make up one global batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from merge_service.errors import UserError
from tests.workers.data_helpers import PREPROCESS, batch, job, words, write_coloured
from workers.data.batches import Batches
from workers.data.mixture import batch_indices, generator
from workers.data.share import CROP_DRAWS, crop_boxes
from workers.feed.pixels import crop


def numbers(images: torch.Tensor) -> list[int]:
    """The sample numbers that `data_helpers.coloured` put into the red channel."""
    red = images[:, 0].mean(dim=(1, 2)) * PREPROCESS["std"][0] + PREPROCESS["mean"][0]
    return (red * 255).round().int().tolist()


@pytest.fixture
def replay(tmp_path: Path):
    pools = [
        write_coloured(tmp_path, name, 25, first=first)
        for name, first in (("new", 0), ("old", 50), ("pool", 100))
    ]
    return job(
        tmp_path / "cache", pools[:1], buffer=pools[1:2], pretraining=pools[2:], mixture=(0.33, 0.34, 0.33)
    )


def test_batch_holds_images_of_every_source_with_their_prompts(replay) -> None:
    batches = Batches(replay, words, PREPROCESS)
    images, tokens = batch(batches, 0)
    assert images.shape == (12, 3, 8, 8) and images.dtype == torch.float32 and tokens.shape == (12, 16)
    seen = numbers(images)
    expected = batch_indices(0, 5, 12, replay.recipe["mixture"], batches.sizes)
    rows = [
        [100 + row for row in expected["pretraining"]],
        list(expected["update"]),
        [50 + row for row in expected["buffer"]],
    ]
    assert seen == [int(row) for part in rows for row in part]
    for number, row in zip(seen, tokens, strict=True):
        name = "new" if number < 50 else "old" if number < 100 else "pool"
        text = "".join(chr(code) for code in row).strip()
        assert text in (f"a {name} {number % 3}", f"the {name} {number % 3}")


def test_same_seed_and_step_give_the_same_batch_in_a_fresh_object(replay) -> None:
    first, second = Batches(replay, words, PREPROCESS), Batches(replay, words, PREPROCESS)
    batch(first, 0), batch(first, 1)
    for one, two in zip(batch(first, 7), batch(second, 7), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(batch(first, 7)[0], batch(first, 8)[0])


@pytest.mark.fault("F25")
@pytest.mark.parametrize("world", [2, 3, 4])
def test_rank_batches_partition_the_global_batch(replay, world: int) -> None:
    images, tokens = batch(Batches(replay, words, PREPROCESS), 3)
    for rank in range(world):
        part, part_tokens = batch(Batches(replay, words, PREPROCESS, rank, world), 3)
        assert torch.equal(part, images[rank::world]) and torch.equal(part_tokens, tokens[rank::world])


@pytest.mark.fault("F25")
def test_batch_that_does_not_divide_among_ranks_is_a_user_error(replay) -> None:
    with pytest.raises(UserError, match="batch_size 12 is not a multiple of the number of workers, 5"):
        Batches(replay, words, PREPROCESS, 0, 5)


def test_sources_without_share_are_not_even_decoded(tmp_path: Path) -> None:
    new = write_coloured(tmp_path, "new", 25)
    gone = write_coloured(tmp_path, "gone", 25)
    (tmp_path / "gone" / "train" / "0.tar").unlink()
    images, _ = batch(Batches(job(tmp_path / "cache", [new], buffer=[gone]), words, PREPROCESS), 0)
    assert max(numbers(images)) < 25


def test_crop_of_the_whole_image_changes_nothing() -> None:
    images = torch.rand(4, 3, 9, 11)
    boxes = crop_boxes(np.zeros((4, CROP_DRAWS)), 9, 11, (1.0, 1.0), (11 / 9, 11 / 9))
    same = crop(images, torch.from_numpy(boxes).float())
    assert torch.allclose(same, images, atol=1e-5)


def test_crop_boxes_follow_the_law_of_torchvision() -> None:
    draws = generator(0).random((20_000, CROP_DRAWS))
    ours = crop_boxes(draws, 224, 224, (0.9, 1.0), (0.75, 4 / 3))
    torch.manual_seed(0)
    image = torch.empty(3, 224, 224)
    theirs = (
        np.array([RandomResizedCrop.get_params(image, [0.9, 1.0], [0.75, 4 / 3]) for _ in range(4000)]) / 224
    )
    assert np.allclose(ours.mean(0), theirs.mean(0), atol=4e-3) and np.allclose(
        ours.std(0), theirs.std(0), atol=4e-3
    )
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= 1 + 1e-9).all()


def test_crop_without_a_fitting_try_falls_back_to_the_centre() -> None:
    boxes = crop_boxes(np.full((1, CROP_DRAWS), 0.999), 10, 30, (1.0, 1.0), (0.5, 1.0))
    assert np.allclose(boxes, [[0, (1 - 1 / 3) / 2, 1, 1 / 3]])
