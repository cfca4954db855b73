"""A served model answers as evaluation scores it, is exchanged whole, and weights that cannot be served change nothing."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.serving_toys import LABELS, Zoo, picture
from tests.workers.model_helpers import Toys
from workers.data.decode import load
from workers.models.model import preprocess_cfg
from workers.scoring.evaluate import Encoder
from workers.serving.batcher import Batching
from workers.serving.decoding import Decoder
from workers.serving.labels import LabelSet, LabelSets
from workers.serving.served import HeadFile, Served
from workers.serving.serving import NothingServed, Serving
from workers.serving.snapshot import Snapshot, WeightsRefused, Work

LABEL_SET = LabelSet(LABELS, ("a {c} thing", "something {c}"))


class Fixed:
    """A head that says what it is set to."""

    def __init__(self, *kept: Served) -> None:
        self.now: Served | None = kept[0] if kept else None
        self._kept = kept

    def current(self) -> Served | None:
        return self.now

    def kept(self) -> tuple[Served, ...]:
        return self._kept


def serving(home: Path, folder: Path, test: Callable[[Serving], Awaitable[None]]) -> None:
    async def main() -> None:
        one = Serving(home, Batching(max_batch=8, max_wait_ms=1), LabelSets(folder))
        try:
            await test(one)
        finally:
            await one.close()

    asyncio.run(main())


def seen(home: Path, *files: bytes) -> np.ndarray:
    async def main() -> np.ndarray:
        decoder = Decoder(preprocess_cfg(home))
        try:
            return np.stack(await asyncio.gather(*map(decoder.decode, files)))
        finally:
            decoder.close()

    return asyncio.run(main())


def expected(served: Served, home: Path, images: np.ndarray, labels: LabelSet | None) -> np.ndarray:
    """What these weights alone answer, by the code of evaluation."""
    encoder = Encoder(home, "cpu", 8, weights=served.path)
    with torch.inference_mode():
        features = encoder.pictures(images)
        if labels is not None:
            scale = encoder.model.logit_scale.exp()
            features = (scale * features @ encoder.classifier(labels.names, labels.templates)).softmax(dim=1)
    return np.asarray(features)


def test_pictures_and_scores_are_those_of_evaluation(toys: Toys) -> None:
    source = toys.source("toy", "test")
    encoder = Encoder(toys.base, "cpu", 16)
    samples = load(source, encoder.preprocess["size"], toys.root / "cache", encoder.preprocess)
    from tests.workers.scoring.test_evaluate import shards

    members = list(shards(toys, "toy").values())
    suffix = next(name for name in members[0] if name not in ("cls", "txt"))
    images = seen(toys.base, *(member[suffix] for member in members))
    assert np.array_equal(images, samples.images[np.arange(len(samples))])
    labels = LabelSet(samples.classes, samples.templates)
    with torch.inference_mode():
        features = torch.cat(list(encoder.images(samples, np.arange(len(samples)))))
        logits = 100.0 * features @ encoder.classifier(labels.names, labels.templates)
    path = toys.base / "open_clip_model.safetensors"
    from tests.serving_toys import sha256_of

    snapshot = Snapshot(toys.base, Served(0, "", sha256_of(path), path, 1))
    (found,) = snapshot.answer([Work(images=images, labels=labels)])
    assert not isinstance(found, Exception)
    assert np.array_equal(found.values.argmax(axis=1), logits.argmax(dim=1).numpy())
    assert np.allclose(found.values.sum(axis=1), 1)


def test_one_batch_answers_pictures_labels_and_texts_each_as_alone(zoo: Zoo) -> None:
    served = zoo.served(1)
    snapshot = Snapshot(zoo.home, served)
    images = seen(zoo.home, *(picture(seed) for seed in range(3)))
    other = LabelSet(("cat", "dog"))
    works = [
        Work(images=images[:2], labels=LABEL_SET),
        Work(texts=("a red thing", "nothing")),
        Work(images=images[2:]),
        Work(images=images[:1], labels=other),
    ]
    together = snapshot.answer(works)
    for work, found in zip(works, together, strict=True):
        (alone,) = snapshot.answer([work])
        assert not isinstance(found, Exception) and not isinstance(alone, Exception)
        assert found.served == served and np.allclose(found.values, alone.values, atol=1e-5)
    first = together[0]
    assert not isinstance(first, Exception)
    assert np.allclose(first.values, expected(served, zoo.home, images[:2], LABEL_SET), atol=1e-5)


def test_swap_changes_all_answers_at_once_and_frees_the_model_before(zoo: Zoo, tmp_path: Path) -> None:
    images = seen(zoo.home, picture())

    async def test(one: Serving) -> None:
        work = Work(images=images, labels=LABEL_SET)
        with pytest.raises(NothingServed):
            await one.answer(work)
        await one.start(Fixed(zoo.served(0)))
        before = await one.answer(work)
        model = weakref.ref(one._snapshot._encoder.model)  # type: ignore[union-attr]
        gc.disable()  # references alone must free it
        try:
            await one.swap(zoo.served(1))
            assert one._snapshot is not None and one._snapshot.knows(LABEL_SET)  # embedded before the swap
            after = await one.answer(work)
            assert model() is None
        finally:
            gc.enable()
        assert (before.served.t, after.served.t) == (0, 1)
        for found in (before, after):
            wanted = expected(found.served, zoo.home, images, LABEL_SET)
            assert np.allclose(found.values, wanted, atol=1e-5)
        assert np.abs(before.values - after.values).max() > 0.01

    serving(zoo.home, tmp_path, test)


def test_batch_that_runs_keeps_the_weights_it_began_with(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = seen(zoo.home, picture())
    entered, go = threading.Event(), threading.Event()
    plain = Encoder.pictures

    def slow(self: Encoder, pictures: np.ndarray) -> torch.Tensor:
        found = plain(self, pictures)
        if threading.current_thread().name.startswith("model"):
            entered.set()
            assert go.wait(30)
        return found

    async def test(one: Serving) -> None:
        await one.start(Fixed(zoo.served(0)))
        monkeypatch.setattr(Encoder, "pictures", slow)
        asking = asyncio.create_task(one.answer(Work(images=images, labels=LABEL_SET)))
        while not entered.is_set():
            await asyncio.sleep(0.001)
        await one.swap(zoo.served(1))
        go.set()
        found = await asking
        assert found.served.t == 0
        assert np.allclose(found.values, expected(found.served, zoo.home, images, LABEL_SET), atol=1e-5)

    serving(zoo.home, tmp_path, test)


@pytest.mark.parametrize("kind", ["truncated", "shapes", "nan", "pickle", "sha256", "absent"])
def test_weights_that_cannot_be_served_change_nothing(zoo: Zoo, tmp_path: Path, kind: str) -> None:
    images = seen(zoo.home, picture())
    damaged, code = zoo.damaged(kind)

    async def test(one: Serving) -> None:
        await one.start(Fixed(zoo.served(0)))
        before = await one.answer(Work(images=images, labels=LABEL_SET))
        with pytest.raises(WeightsRefused) as refused:
            await one.swap(damaged)
        assert refused.value.code == code
        assert (one.standing.served, one.standing.problem) == (zoo.served(0), code)
        after = await one.answer(Work(images=images, labels=LABEL_SET))
        assert after.served.t == 0 and np.array_equal(before.values, after.values)
        await one.swap(zoo.served(2))
        assert one.standing.problem is None and one.standing.served == zoo.served(2)

    serving(zoo.home, tmp_path, test)


def test_process_that_starts_with_weights_that_cannot_be_served_takes_the_newest_kept_ones(
    zoo: Zoo, tmp_path: Path
) -> None:
    damaged, code = zoo.damaged("truncated")

    async def test(one: Serving) -> None:
        await one.start(Fixed(damaged, zoo.served(0), zoo.served(2), zoo.served(1)))
        assert (one.standing.served, one.standing.wanted) == (zoo.served(2), damaged)
        assert one.standing.problem == code

    serving(zoo.home, tmp_path, test)


def test_follower_serves_what_the_head_says_and_gives_up_no_weights(zoo: Zoo, tmp_path: Path) -> None:
    head = Fixed(zoo.served(0))
    damaged, code = zoo.damaged("shapes")

    async def until(condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.005)

    async def test(one: Serving) -> None:
        await one.start(head)
        following = asyncio.create_task(one.follow(head, every=0.005))
        head.now = damaged
        await until(lambda: one.standing.problem == code)
        head.now = zoo.served(0)
        await until(lambda: one.standing.problem is None)
        assert one.standing.served == zoo.served(0)
        head.now = zoo.served(2)
        await until(lambda: one.standing.served == zoo.served(2))
        following.cancel()

    serving(zoo.home, tmp_path / "sets", test)


def test_head_file_that_cannot_be_read_leaves_the_last_statement(zoo: Zoo, tmp_path: Path) -> None:
    head = HeadFile(tmp_path / "head.json")
    assert head.current() is None and head.kept() == ()
    head.write(zoo.served(1), [zoo.served(0)])
    other = HeadFile(tmp_path / "head.json")
    assert other.current() == zoo.served(1) and set(other.kept()) == {zoo.served(0), zoo.served(1)}
    (tmp_path / "head.json").write_text('{"current": {"t": ')
    assert other.current() == zoo.served(1)
    head.write(None)
    assert other.current() is None
