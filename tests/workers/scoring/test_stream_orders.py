"""Measures of classes by the base: scores and embeddings against plain code, the path against brute force, the cache."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from merge_service.errors import UserError
from pipeline.study.sections_stream import StreamSection
from pipeline.study.streams import make_stream
from tests.workers.model_helpers import COLOURS, Toys, noisy
from workers.data.decode import load
from workers.data.writer import Sample, write_dataset
from workers.jobs import EvaluateJob, Source
from workers.scoring import stream_orders
from workers.scoring.evaluate import Encoder, evaluate
from workers.scoring.stream_orders import (
    Subject,
    class_embeddings,
    class_places,
    class_scores,
    greedy_path,
    measure,
    starts,
)


@pytest.fixture
def subject(toys: Toys, tmp_path: Path) -> Subject:
    return Subject("toy base", lambda: toys.base, str(toys.root / "data"), tmp_path / "cache")


def brute_force(vectors: np.ndarray) -> list[int]:
    """Every start, one step at a time, nothing clever."""
    units = [vector / math.sqrt(sum(vector**2)) for vector in vectors.astype(float)]
    best: tuple[float, list[int]] = (math.inf, [])
    for start in range(len(units)):
        walk, length = [start], 0.0
        while len(walk) < len(units):
            left = [at for at in range(len(units)) if at not in walk]
            distances = [1 - float(np.dot(units[walk[-1]], units[at])) for at in left]
            length += min(distances)
            walk.append(left[distances.index(min(distances))])
        if length < best[0] - 1e-9:
            best = (length, walk)
    return best[1]


# --- the path ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20, 41])
def test_greedy_path_is_that_of_brute_force(count: int) -> None:
    vectors = np.random.default_rng(count).normal(size=(count, 5))
    assert greedy_path(vectors).tolist() == brute_force(vectors)


def test_greedy_path_follows_an_arc_from_one_of_its_ends() -> None:
    angles = np.deg2rad([40, 0, 30, 10, 60])
    assert greedy_path(np.stack([np.cos(angles), np.sin(angles)], axis=1)).tolist() == [1, 3, 2, 0, 4]


def test_greedy_path_takes_the_first_of_equals() -> None:
    corners = np.eye(5, dtype=np.float32)
    assert greedy_path(corners).tolist() == [0, 1, 2, 3, 4]
    twins = np.random.default_rng(0).normal(size=(300, 7))[np.arange(600) % 300]
    walk = greedy_path(twins).tolist()
    assert [b - a for a, b in zip(walk[::2], walk[1::2], strict=True)] == [300] * 300


def test_greedy_path_does_not_see_lengths_of_vectors() -> None:
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(30, 6))
    assert (greedy_path(vectors) == greedy_path(vectors * rng.uniform(0.1, 9, (30, 1)))).all()


def test_starts_are_all_of_a_small_set_and_evenly_spaced_in_a_large_one() -> None:
    assert starts(1024).tolist() == list(range(1024))
    assert len(starts(1100)) == 2**30 // 1100**2 < 1100
    large = starts(18_381)
    assert len(set(large.tolist())) == 32
    assert set(np.diff(large).tolist()) == {574, 575}
    assert large[-1] < 18_381


def test_vector_without_direction_is_refused() -> None:
    with pytest.raises(UserError, match="zero or not finite"):
        greedy_path(np.zeros((3, 4)))


# --- measures of a base -----------------------------------------------------------------------------------------------------


def test_class_scores_are_those_of_plain_counting(toys: Toys, subject: Subject) -> None:
    scores = class_scores(subject, ["toy"])
    assert list(scores) == [("toy", colour) for colour in COLOURS]
    encoder = Encoder(toys.base, "cpu", 7)
    samples = load(toys.source("toy"), 32, subject.cache, encoder.preprocess)
    with torch.inference_mode():
        classifier = encoder.classifier(samples.classes, samples.templates)
        features = torch.cat(list(encoder.images(samples, np.arange(len(samples)))))
        logits = encoder.model.logit_scale.exp() * features @ classifier
    for label, colour in enumerate(COLOURS):
        own = logits[torch.from_numpy(samples.labels == label)]
        accuracy, log_probability = scores["toy", colour]
        assert accuracy == sum(int(row.argmax()) == label for row in own) / len(own)
        assert log_probability == pytest.approx(float(own.log_softmax(1)[:, label].mean()), abs=1e-5)


def test_class_scores_weighted_by_images_are_the_score_of_the_train_split(
    toys: Toys, subject: Subject
) -> None:
    scores = class_scores(subject, ["toy", "old"])
    job = EvaluateJob(
        "f", "toy", str(toys.base), (toys.source("toy"), toys.source("old")), cache=str(subject.cache)
    )
    for name, score in evaluate(job)["scores"].items():
        assert np.mean([scores[name, colour][0] for colour in COLOURS]) == pytest.approx(
            score, abs=1e-12
        )  # 16 images each


def test_class_embeddings_are_unit_vectors_of_the_zero_shot_classifier(toys: Toys, subject: Subject) -> None:
    vectors = class_embeddings(subject, ["old"])
    with torch.inference_mode():
        classifier = Encoder(toys.base, "cpu", 7).classifier(COLOURS, ("a {c} thing", "something {c}"))
    for column, colour in enumerate(COLOURS):
        assert vectors["old", colour] == pytest.approx(classifier[:, column].numpy(), abs=1e-6)
        assert np.linalg.norm(vectors["old", colour]) == pytest.approx(1, abs=1e-5)


def test_retrieval_set_is_one_element(toys: Toys, subject: Subject, tmp_path: Path) -> None:
    root = tmp_path / "data"
    pairs = [
        replace(sample, label=None, captions=(f"{COLOURS[at % 5]} {at}", "x")[: 1 + at % 2])
        for at, sample in enumerate(noisy(10, 10, 9))
    ]
    write_dataset(root / "pairs", kind="retrieval", classes=(), templates=(), splits={"train": pairs})
    subject = replace(subject, root=str(root))
    job = EvaluateJob(
        "f", "toy", str(toys.base), (Source(str(root), "pairs", "train"),), cache=str(subject.cache)
    )
    assert class_scores(subject, ["pairs"]) == {("pairs", ""): (evaluate(job)["scores"]["pairs"], 0.0)}
    texts = [caption for pair in pairs for caption in pair.captions]
    with torch.inference_mode():
        mean = Encoder(toys.base, "cpu", 99).texts(texts).mean(dim=0).numpy()
    vector = class_embeddings(subject, ["pairs"])["pairs", ""]
    assert vector == pytest.approx(mean / np.linalg.norm(mean), abs=1e-6)


def test_class_without_train_images_has_no_score(subject: Subject, tmp_path: Path) -> None:
    samples = [Sample(np.zeros((32, 32, 3), np.uint8), 0)]
    write_dataset(
        tmp_path / "d" / "gap",
        kind="classification",
        classes=["a", "b"],
        templates=["{c}"],
        splits={"train": samples},
    )
    with pytest.raises(UserError, match=r"'gap' has no train image of 1 of its classes \(b\)"):
        class_scores(replace(subject, root=str(tmp_path / "d")), ["gap"])


@pytest.mark.parametrize("order", ["performance", "similarity"])
def test_measure_is_taken_once_and_then_needs_no_model(
    toys: Toys, subject: Subject, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure(order, subject, ["toy", "old"])  # type: ignore[arg-type]

    def unwanted() -> Path:
        raise AssertionError("the base was asked again")

    again = replace(subject, directory=unwanted)
    assert measure(order, again, ["old", "toy"]) == first  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="asked again"):
        measure(order, replace(again, identity="another base"), ["toy"])  # type: ignore[arg-type]
    assert not list(subject.cache.glob("streams/.*"))


def test_places_follow_the_greedy_path_over_all_classes(subject: Subject) -> None:
    vectors = class_embeddings(subject, ["old", "toy"])
    elements = list(vectors)
    expected = [elements[at] for at in brute_force(np.stack(list(vectors.values())))]
    places = class_places(subject, ["toy", "old"])
    assert sorted(places, key=places.__getitem__) == expected
    assert sorted(places.values()) == list(range(10))


def test_measures_make_a_stream(subject: Subject) -> None:
    datasets = {"toy": COLOURS, "old": COLOURS}
    for order in ("performance", "similarity"):
        section = StreamSection(order=order, chunks=3)  # type: ignore[arg-type]
        stream = make_stream(section, datasets, measure(order, subject, ["toy", "old"]))  # type: ignore[arg-type]
        assert [sum(len(part.classes or COLOURS) for part in task.parts) for task in stream.tasks] == [
            4,
            3,
            3,
        ]


def test_element_of_a_whole_dataset_is_written_alike_in_both_rooms() -> None:
    from pipeline.study import streams

    assert stream_orders.WHOLE == streams.WHOLE
