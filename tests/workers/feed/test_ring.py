"""Batches on their way to a device: the same bytes on every device, with copies and events in the order that a GPU needs."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from merge_service.errors import UserError
from tests.workers.data_helpers import PREPROCESS, job, words, write_coloured
from tests.workers.fake_cuda import FakeCuda
from workers.data.batches import Batches
from workers.data.decode import load
from workers.data.share import Share
from workers.feed.device import Host, device_of
from workers.feed.pixels import Pixels
from workers.feed.ring import Batch, InOrder, feed, ready

PIXELS = Pixels(PREPROCESS, Host.place)
STEPS = range(2, 12)


@pytest.fixture
def batches(tmp_path: Path) -> Batches:
    pools = [
        write_coloured(tmp_path, name, 25, first=at) for name, at in (("new", 0), ("old", 50), ("pool", 100))
    ]
    return Batches(
        job(
            tmp_path / "cache",
            pools[:1],
            buffer=pools[1:2],
            pretraining=pools[2:],
            mixture=(0.33, 0.34, 0.33),
        ),
        words,
        PREPROCESS,
    )


def copied(batch: Batch) -> Batch:
    return Batch(*(part.clone() for part in batch))


@pytest.mark.parametrize(
    ("device", "loaders"), [("cpu", 1), ("cpu", 3), ("fake", 1), ("fake", 2), ("fake", 5)]
)
def test_batches_are_the_same_on_every_device_with_any_number_of_loaders(
    batches: Batches, device: str, loaders: int
) -> None:
    on = FakeCuda() if device == "fake" else Host()
    found = [(step, copied(batch)) for step, batch in feed(batches, PIXELS, on, STEPS, loaders)]
    assert [step for step, _ in found] == list(STEPS)
    for step, batch in found:
        assert all(map(torch.equal, batch, ready(batches, PIXELS, step)))


def test_no_memory_is_written_while_a_copy_or_a_step_may_still_use_it(batches: Batches) -> None:
    device = FakeCuda()
    for _ in feed(batches, PIXELS, device, STEPS):
        device.note("compute", 0)
    log, last, again = device.log, dict[int, int](), 0

    def after(at: int, *what: object) -> int:
        """The first such call after another."""
        return next(i for i in range(at, len(log)) if log[i][: len(what)] == what)

    for at, call in enumerate(log):
        if call.what != "copy":
            continue
        assert call.stream == "copies", "a copy on the stream that computes would hold it up"
        if call.of in last:
            again += 1
            before = last[call.of]
            done = log[after(before, "record", "copies")].of
            assert ("synchronize", done) in [(one.what, one.of) for one in log[before:at]], (
                "filled while it was copied"
            )
            computed = after(after(before, "wait", "compute", done), "compute")
            used = next(log[i].of for i in range(at, 0, -1) if log[i][:2] == ("wait", "copies"))
            assert after(computed, "record", "compute", used) < at, "the copy may overwrite what a step reads"
        last[call.of] = at
    assert len(last) == 4 * device.slots and again == 4 * (len(STEPS) - device.slots)


def test_thread_that_computes_waits_for_no_copy(batches: Batches) -> None:
    device = FakeCuda()
    mine = [call.thread for call in device.log]
    for _ in feed(batches, PIXELS, device, STEPS):
        mine += [call.thread for call in device.log if call.what == "record" and call.stream == "compute"]
    waited = {call.thread for call in device.log[: -device.slots] if call.what == "synchronize"}
    assert mine and waited and not waited & set(mine)


class Broken:
    """The third batch cannot be read."""

    shape = (2, 8, 8, 3)

    def share(self, step: int) -> Share:
        none = np.zeros((2, 1), np.int64)
        return Share(np.zeros(2), np.arange(2) + step, np.zeros((2, 4), np.float32), none, none[:, 0])

    def read(self, share: Share, start: int, stop: int, out: np.ndarray) -> None:
        if share.rows[0] == 2:
            raise UserError("picture 2 cannot be read")


@pytest.mark.parametrize("device", [Host(), FakeCuda()], ids=["cpu", "fake"])
def test_batch_that_cannot_be_read_is_an_error_at_its_step_and_not_before(device: Host) -> None:
    seen, shares = [], Broken()
    with pytest.raises(UserError, match="picture 2"):
        for step, _ in feed(shares, PIXELS, device, range(9), 2):
            seen.append(step)
    assert seen == [0, 1]


@pytest.mark.parametrize("device", [Host(), FakeCuda()], ids=["cpu", "fake"])
def test_pictures_in_order_are_those_of_the_split_whatever_the_batch(device: Host, tmp_path: Path) -> None:
    samples = load(write_coloured(tmp_path, "toys", 25), 8, tmp_path / "cache")
    for rows in (np.arange(25), np.array([3, 4, 5, 9, 20]), np.array([7])):
        shares = InOrder(samples, rows, 4)
        found = torch.cat([batch.images for _, batch in feed(shares, PIXELS, device, shares.steps, 2)])
        expected = PIXELS(torch.from_numpy(np.array(samples.images[rows])))
        assert torch.equal(found, expected)


def test_device_is_that_of_the_job() -> None:
    assert device_of("cpu").place.type == "cpu" and device_of("cpu").slots == 1


@pytest.mark.parametrize("device", [Host(), FakeCuda()], ids=["cpu", "fake"])
def test_work_beside_computing_has_threads_of_its_own_only_where_another_device_computes(
    device: Host,
) -> None:
    with device.helpers(1) as helpers:
        done = helpers.submit(threading.get_ident).result()
        failed = helpers.submit(int, "no number")
    assert (done == threading.get_ident()) is not device.overlaps
    with pytest.raises(ValueError, match="no number"):
        failed.result()
