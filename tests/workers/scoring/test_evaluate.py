"""Scores equal those of a plain open_clip evaluation; subsets are balanced and reproducible."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import workers.scoring.evaluate as evaluation
from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.errors import NonFiniteCheckpoint, UserError
from tests.workers.model_helpers import COLOURS, Toys
from workers.data.decode import Samples, load
from workers.data.encoded.pictures import Pictures
from workers.data.writer import write_dataset
from workers.jobs import Source
from workers.models.model import tokenizer
from workers.scoring.evaluate import Encoder, evaluate, retrieval, subset
from workers.scoring.kept import Kept, tower_digests
from workers.training.expert import train_expert


@pytest.fixture(scope="module")
def expert(toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is neither at chance nor perfect."""
    job = toys.job(tmp_path_factory.mktemp("evaluated") / "expert", steps=4)
    train_expert(job)
    return Path(job.out)


def shards(toys: Toys, name: str) -> dict[str, dict[str, bytes]]:
    """The members of a test split, by key and suffix, read with nothing but tarfile."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted((toys.root / "data" / name / "test").glob("*.tar"), key=lambda path: int(path.stem)):
        with tarfile.open(path) as archive:
            for member in archive:
                key, suffix = member.name.split(".", 1)
                file = archive.extractfile(member)
                assert file is not None
                found.setdefault(f"{path.stem}/{key}", {})[suffix] = file.read()
    return found


def plain_features(toys: Toys, model_dir: Path, name: str) -> tuple[torch.Tensor, list[dict[str, bytes]]]:
    """Image features by open_clip's own loader and preprocessing, one image at a time, and the members."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model_dir}")
    members = list(shards(toys, name).values())
    suffix = next(suffix for suffix in members[0] if suffix not in ("cls", "txt"))
    images = torch.stack([preprocess(Image.open(io.BytesIO(member[suffix]))) for member in members])
    with torch.no_grad():
        return model.eval().encode_image(images, normalize=True), members


def test_accuracy_is_that_of_plain_open_clip(toys: Toys, expert: Path) -> None:
    features, members = plain_features(toys, expert, "toy")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{expert}")
    classifier = open_clip.build_zero_shot_classifier(
        model.eval(),
        open_clip.get_tokenizer(f"local-dir:{expert}"),
        COLOURS,
        [lambda name: f"a {name} thing", lambda name: f"something {name}"],
    )
    labels = torch.tensor([int(member["cls"]) for member in members])
    expected = int(((100.0 * features @ classifier).argmax(1) == labels).sum()) / len(labels)
    result = evaluate(toys.evaluation(expert, "toy"))
    assert result["scores"]["toy"] == expected and 0.2 < expected < 1
    assert result["samples"] == {"toy": 60} and result["seconds"] > 0

    encoder = Encoder(expert, "cpu", 16)
    samples = load(toys.source("toy", "test"), 32, toys.root / "cache", encoder.preprocess)
    with torch.inference_mode():
        found = torch.cat(list(encoder.images(samples, np.arange(len(samples)))))
        assert torch.allclose(found, features, atol=1e-6)
        assert torch.allclose(encoder.classifier(samples.classes, samples.templates), classifier, atol=1e-6)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    """Nothing kept yet."""
    fresh = Kept()
    monkeypatch.setattr(evaluation, "KEPT", fresh)
    return fresh


def test_scores_are_the_same_on_splits_as_they_are_stored(
    toys: Toys, expert: Path, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A split is decoded once for all evaluations while there is room for it, and for every pass where there is none."""
    decoded: list[int] = []
    whole = Pictures._whole
    monkeypatch.setattr(Pictures, "_whole", lambda self, row: decoded.append(row) or whole(self, row))
    job = toys.evaluation(expert, "toy", "old", "pairs")
    stored = replace(job, datasets=tuple(replace(source, reading="encoded") for source in job.datasets))
    scores, size = evaluate(job)["scores"], 32 * 32 * 3
    for room, passed in ((60 * size - 1, 120), (60 * size, 90), (150 * size, 0)):
        monkeypatch.setattr(evaluation, "DECODED_BYTES", room)
        monkeypatch.setattr(evaluation, "KEPT", Kept())
        decoded.clear()
        assert evaluate(stored)["scores"] == scores
        assert len(decoded) == passed


@pytest.mark.parametrize("trainable", ["image", "text", "all"])
def test_what_a_frozen_tower_made_is_not_made_again_and_scores_are_the_same(
    toys: Toys, tmp_path: Path, kept: Kept, monkeypatch: pytest.MonkeyPatch, trainable: str
) -> None:
    job = toys.job(tmp_path / "expert", steps=3, trainable=trainable)
    train_expert(job)
    names = ("toy", "pairs")
    fresh = evaluate(toys.evaluation(Path(job.out), *names))["scores"]
    monkeypatch.setattr(evaluation, "KEPT", Kept())
    evaluate(toys.evaluation(toys.base, *names))
    calls: list[str] = []
    encoded = Encoder._encoded

    def noted(encoder: Encoder, encode: Any, given: torch.Tensor) -> torch.Tensor:
        calls.append("image" if given.is_floating_point() else "text")
        return encoded(encoder, encode, given)

    monkeypatch.setattr(Encoder, "_encoded", noted)
    assert evaluate(toys.evaluation(Path(job.out), *names))["scores"] == fresh
    assert set(calls) == ({"image", "text"} if trainable == "all" else {trainable})
    calls.clear()
    assert evaluate(toys.evaluation(Path(job.out), *names))["scores"] == fresh and not calls
    evaluate(toys.evaluation(Path(job.out), *names, batch_size=7))
    assert set(calls) == {"image", "text"}, "another number of pictures at once may round otherwise"


def test_what_is_kept_has_a_bound_and_the_least_used_goes_first() -> None:
    kept, one = Kept(most=100), torch.zeros(10)
    kept.put("a", one)
    kept.put("b", one)
    assert kept.get("a") is one
    kept.put("c", one)
    assert kept.get("b") is None and kept.get("a") is one and kept.get("c") is one
    kept.put("large", torch.zeros(26))
    kept.put("a", one)
    assert kept.get("large") is None and kept.get("c") is one


def test_digest_of_a_tower_is_that_of_its_weights_alone(toys: Toys, tmp_path: Path) -> None:
    base = tower_digests(toys.base)
    assert base.keys() == {"image", "text"} and base["image"] != base["text"]
    for which, other in (("image", "text"), ("text", "image")):
        job = toys.job(tmp_path / which, steps=1, trainable=which)
        train_expert(job)
        found = tower_digests(Path(job.out))
        assert found[other] == base[other] and found[which] != base[which]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_scores_nearly_alike_with_features_in_single(
    toys: Toys, expert: Path, kept: Kept, precision: str
) -> None:
    single, half = (Encoder(expert, "cpu", 16, precision=one) for one in ("fp32", precision))
    samples = load(toys.source("toy", "test"), 32, toys.root / "cache", single.preprocess)
    with torch.inference_mode():
        exact, found = (torch.cat(list(one.images(samples, np.arange(60)))) for one in (single, half))
    assert found.dtype == torch.float32 and torch.allclose(found.norm(dim=1), torch.ones(60), atol=1e-6)
    assert not torch.equal(found, exact) and torch.allclose(found, exact, atol=0.02)
    scores = [evaluate(replace(toys.evaluation(expert, "toy"), precision=one)) for one in ("fp32", precision)]
    assert scores[1]["scores"]["toy"] == pytest.approx(scores[0]["scores"]["toy"], abs=0.1)


def test_recall_is_that_of_the_definition_in_both_directions(toys: Toys, expert: Path) -> None:
    features, members = plain_features(toys, expert, "pairs")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{expert}")
    captions = [
        (owner, line) for owner, member in enumerate(members) for line in member["txt"].decode().split("\n")
    ]
    tokens = open_clip.get_tokenizer(f"local-dir:{expert}")([line for _, line in captions])
    with torch.no_grad():
        similar = features @ model.eval().encode_text(tokens, normalize=True).T
    owners = [owner for owner, _ in captions]
    assert len(owners) > len(members) == 30
    image_hits = [
        image in {owners[k] for k in row.argsort(descending=True)[:5]} for image, row in enumerate(similar)
    ]
    text_hits = [
        owners[k] in column.argsort(descending=True)[:5].tolist() for k, column in enumerate(similar.T)
    ]
    expected = (np.mean(image_hits) + np.mean(text_hits)) / 2
    result = evaluate(toys.evaluation(expert, "pairs", batch_size=7))
    assert result["scores"]["pairs"] == pytest.approx(expected, abs=1e-9) and 0 < expected < 1


def test_details_agree_with_the_scores_and_are_given_only_where_they_are_asked_for(
    toys: Toys, expert: Path
) -> None:
    plain = evaluate(toys.evaluation(expert, "toy"))
    job = replace(
        toys.evaluation(expert, "toy"), details=("top5", "mean_per_class", "per_class", "confusion")
    )
    found = evaluate(job)
    assert found["scores"] == plain["scores"] and "details" not in plain
    toy = found["details"]["toy"]
    assert sum(one["samples"] for one in toy["per_class"].values()) == 60
    right = sum(one["samples"] * one["score"] for one in toy["per_class"].values())
    assert right / 60 == pytest.approx(plain["scores"]["toy"])
    assert sum(count for _, _, count in toy["confusion"]) == 60 - round(right)
    assert toy["mean_per_class"] == pytest.approx(
        np.mean([one["score"] for one in toy["per_class"].values()])
    )
    assert plain["scores"]["toy"] <= toy["top5"] <= 1
    pairs = evaluate(replace(toys.evaluation(expert, "pairs"), details=("top5",)))
    both = pairs["details"]["pairs"]
    assert pairs["scores"]["pairs"] == (both["image_to_text"] + both["text_to_image"]) / 2


def test_picture_with_a_sample_for_each_caption_scores_as_one_picture_with_all(
    toys: Toys, expert: Path
) -> None:
    encoder, job = Encoder(expert, "cpu", 7), toys.evaluation(expert, "pairs")
    whole = load(job.datasets[0], encoder.preprocess["size"], job.cache, encoder.preprocess)
    owners = np.array([row for row, captions in enumerate(whole.captions) for _ in captions] * 2)
    captions = [(caption,) for captions in whole.captions for caption in captions]
    captions += [(f"{caption} again",) for (caption,) in captions]
    order = np.random.default_rng(0).permutation(len(owners))
    apart = replace(
        whole, images=np.asarray(whole.images)[owners[order]], labels=whole.labels[owners[order]],
        captions=[captions[at] for at in order], pictures=owners[order],
    )  # fmt: skip
    both = replace(
        whole, captions=[(*texts, *(f"{text} again" for text in texts)) for texts in whole.captions]
    )
    with torch.inference_mode():
        score = retrieval(encoder, apart, np.arange(len(apart)))
        assert score == pytest.approx(retrieval(encoder, both, np.arange(len(both))), abs=1e-9)
        alone = replace(apart, pictures=np.arange(len(apart)))
        assert score > retrieval(encoder, alone, np.arange(len(apart)))


def test_split_without_samples_is_refused_by_name(toys: Toys, expert: Path, tmp_path: Path) -> None:
    write_dataset(
        tmp_path / "empty", kind="classification", classes=["a"], templates=["{c}"], splits={"test": []}
    )
    job = replace(toys.evaluation(expert, "toy"), datasets=(Source(str(tmp_path), "empty", "test"),))
    with pytest.raises(UserError, match=r"'empty': the test split holds no sample"):
        evaluate(job)


def test_several_datasets_are_scored_in_one_call_whatever_the_batch_size(toys: Toys, expert: Path) -> None:
    one = evaluate(toys.evaluation(expert, "toy", "pairs", "old"))
    other = evaluate(toys.evaluation(expert, "toy", "pairs", "old", batch_size=13, threads=2))
    assert one["scores"] == other["scores"] and list(one["scores"]) == ["toy", "pairs", "old"]


def test_texts_are_tokenised_once_for_all_models(
    toys: Toys, expert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    plain = tokenizer(toys.base).plain
    monkeypatch.setattr(
        tokenizer(toys.base), "plain", lambda texts: asked.append(list(texts)) or plain(texts)
    )
    first = Encoder(toys.base, "cpu", 16).tokens(["never seen", "before", "never seen"])
    again = Encoder(expert, "cpu", 16).tokens(["before", "never seen"])
    assert torch.equal(again, first[[1, 0]]) and asked == [["never seen", "before"]]


def labelled(labels: list[int], kind: str = "classification") -> Samples:
    count = len(labels)
    images = np.zeros((count, 1, 1, 3), np.uint8)
    return Samples(
        "many", kind, images, np.array(labels), [()] * count, ("a", "b", "c"), ("{c}",), np.arange(count)
    )


def test_subset_is_balanced_seeded_and_never_smaller_than_the_published_floors() -> None:
    samples = labelled([0] * 9000 + [1] * 900 + [2] * 100)
    rows = subset(samples, 0.1, seed=3)
    counts = np.bincount(samples.labels[rows])
    assert len(rows) == 1000 and counts[2] == 100 and abs(counts[0] - counts[1]) <= 1
    assert np.array_equal(rows, subset(samples, 0.1, seed=3)) and np.array_equal(rows, np.sort(rows))
    assert not np.array_equal(rows, subset(samples, 0.1, seed=4))
    assert len(subset(samples, 0.001, seed=3)) == 300
    many = labelled([label % 400 for label in range(2000)])
    assert (np.bincount(many.labels[subset(many, 0.1, seed=0)]) == 2).all()


def test_subset_of_everything_or_of_little_is_everything() -> None:
    assert np.array_equal(subset(labelled([0] * 500), 1.0, seed=0), np.arange(500))
    assert len(subset(labelled([0, 1] * 100), 0.1, seed=0)) == 200
    assert len(subset(labelled([-1] * 5000, "retrieval"), 0.1, seed=0)) == 500


def test_fraction_of_a_small_set_scores_like_the_whole(toys: Toys, expert: Path) -> None:
    whole = evaluate(toys.evaluation(expert, "toy"))
    assert evaluate(toys.evaluation(expert, "toy", fraction=0.5))["scores"] == whole["scores"]


def test_restricting_classes_keeps_all_classes_in_the_race(toys: Toys, expert: Path) -> None:
    job = toys.evaluation(expert, "toy")
    some = replace(job, datasets=(replace(job.datasets[0], classes=("red", "blue")),))
    assert evaluate(some)["samples"] == {"toy": 24}


def test_weights_too_large_to_use_are_named(toys: Toys, tmp_path: Path) -> None:
    tensors = load_file(toys.base / WEIGHTS_FILE)
    tensors["visual.proj"].fill_(3e38)
    for file in toys.base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(
        NonFiniteCheckpoint, match=r"the toy.*features of images are not finite on dataset 'toy'"
    ):
        evaluate(toys.evaluation(tmp_path, "toy"))


def test_weights_that_are_not_finite_are_not_called_finite(toys: Toys, tmp_path: Path) -> None:
    tensors = load_file(toys.base / WEIGHTS_FILE)
    tensors["visual.proj"][0, 0] = float("nan")
    for file in toys.base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(NonFiniteCheckpoint, match=r"visual\.proj holds numbers that are not finite"):
        evaluate(toys.evaluation(tmp_path, "toy"))


def test_missing_weights_or_data_are_mistakes_and_threads_are_restored(toys: Toys, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    with pytest.raises(UserError, match="is missing"):
        evaluate(toys.evaluation(tmp_path, "toy", threads=2))
    with pytest.raises(UserError, match="no dataset 'nowhere'"):
        evaluate(toys.evaluation(toys.base, "nowhere", threads=2))
    assert torch.get_num_threads() == before


def test_score_does_not_depend_on_what_was_scored_before_or_beside_it(toys: Toys, expert: Path) -> None:
    alone = evaluate(toys.evaluation(expert, "toy", fraction=0.5))["scores"]["toy"]
    evaluate(toys.evaluation(toys.base, "old", "pairs", "toy"))
    assert evaluate(toys.evaluation(expert, "pairs", "old", "toy", fraction=0.5))["scores"]["toy"] == alone


def test_classifier_of_many_classes_is_that_of_one_class_at_a_time(toys: Toys, expert: Path) -> None:
    classes, templates = [f"number {i}" for i in range(150)], ("a {c}", "the {c}", "some {c} here")
    encoder = Encoder(expert, "cpu", 16)
    with torch.inference_mode():
        found = encoder.classifier(classes, templates)
        for column, name in zip(found.T, classes, strict=True):
            each = [template.replace("{c}", name) for template in templates]
            mean = encoder.model.encode_text(encoder.tokens(each), normalize=True).mean(0)
            assert torch.allclose(column, mean / mean.norm(), atol=1e-6)
