"""Measures of classes by the base model, for the orders of a stream: accuracy per class, and distance between classes.

FoMo-in-Flux (arXiv 2408.14471) orders streams by both.

- Performance is the zero-shot accuracy of every class. It is measured on the *train* split, so that no test image affects a
  stream (our convention; the paper's criterion is not published).
- Similarity is a greedy walk from class to nearest class over text embeddings of the class captions. The shortest walk over all starts
  is kept. The paper uses the text tower of ViT-L/14; this module uses that of the study's base (our convention).

Invariant: a cached measure is named after the base, the content of the datasets and the measure, and is complete or absent.
If every measure is cached, torch is not loaded.
"""

import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from merge_service.errors import NonFiniteCheckpoint, UserError
from workers.data import manifest
from workers.data.cache import Access, remember
from workers.data.seen import content_digest
from workers.jobs import Source

if TYPE_CHECKING:
    from workers.data.decode import Samples
    from workers.scoring.evaluate import Encoder

VERSION = 1
"""Increase it when measures change, so that cached ones of earlier code are not used."""
SPLIT = "train"
WHOLE = ""
"""The class name of the one element of a retrieval set."""
LEAST_STARTS, STEPS = 32, 2**30
GRID = 2.0**20
"""Grid steps per unit of a coordinate. Products and sums of such numbers are exact in float64, in any order."""

Element = tuple[str, str]


@dataclass(frozen=True)
class Subject:
    """A base and the data root on which it is measured.

    `identity` identifies weights and configuration. `directory` returns the weights directory; it is called at most once, and only if
    a measure is not cached. The directory and the device are not part of the name of a cached measure.
    """

    identity: str
    directory: Callable[[], Path]
    root: str
    cache: Path
    device: str = "cpu"
    batch_size: int = 256

    @cached_property
    def encoder(self) -> "Encoder":
        from workers.scoring.evaluate import Encoder

        return Encoder(self.directory(), self.device, self.batch_size)

    @cached_property
    def info(self) -> Callable[[str], manifest.DatasetInfo]:
        """Descriptions by name, each read once."""
        known: dict[str, manifest.DatasetInfo] = {}

        def describe(name: str) -> manifest.DatasetInfo:
            if name not in known:
                known[name] = manifest.describe(self.root, name, self.cache)
            return known[name]

        return describe

    def samples(self, name: str) -> "Samples":
        """The decoded train split. Raises UserError if it is missing or empty, ShardError if it is damaged."""
        from workers.data.decode import load

        preprocess = self.encoder.preprocess
        samples = load(Source(self.root, name, SPLIT), preprocess["size"], self.cache, preprocess)
        if not len(samples):
            raise UserError(f"dataset {name!r} has an empty {SPLIT} split; remove it from the stream")
        return samples

    def key(self, what: str, names: Sequence[str]) -> str:
        """The identifier of the measure `what` on these datasets: 32 hex digits."""
        content = [VERSION, what, self.identity, [self._content(name) for name in names]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    def _content(self, name: str) -> list[str]:
        """The name and digest of a dataset, and the digest of converted pictures if its train split has any."""
        info = self.info(name)
        if SPLIT not in info.splits:
            return [name, info.digest]
        split, survey = info.splits[SPLIT], manifest.verify(self.root, name, SPLIT, self.cache)
        seen = content_digest(split, survey, scored=True)
        return [name, info.digest, *([] if seen == split.digest else [seen])]

    def kept(self, what: str, names: Sequence[str], make: Callable[[], np.ndarray]) -> np.ndarray:
        """The result of `make`, from the cache if it is there. Raises NonFiniteCheckpoint if the base gives non-finite numbers."""
        label = names[0] if len(names) == 1 else f"{len(names)}-datasets"
        place = self.cache / "streams" / f"{what}-{label}-{self.key(what, names)}.npy"
        if not place.is_file():
            try:
                made = make()
            except FloatingPointError as error:
                raise NonFiniteCheckpoint(
                    f"the base on {label}: {error}; take another base or order"
                ) from error
            stream = io.BytesIO()
            np.save(stream, made, allow_pickle=False)
            remember(place, stream.getvalue(), Access.of(Path(self.root)))
            return made
        return np.load(place, allow_pickle=False)


def measure(
    order: Literal["performance", "similarity"], subject: Subject, names: Sequence[str]
) -> Mapping[Element, tuple[float, float] | int]:
    """The argument `measured` of `pipeline.study.streams.make_stream` for an order over these datasets.

    It is `class_scores` for "performance" and `class_places` for "similarity"; errors are theirs.
    """
    return class_scores(subject, names) if order == "performance" else class_places(subject, names)


def class_scores(subject: Subject, names: Sequence[str]) -> dict[Element, tuple[float, float]]:
    """(accuracy, mean log-probability of the true class) of every class on the train split, by (dataset, class).

    Accuracy is top-1 over all classes of the dataset; the probability is that of the softmax at the temperature of the base.
    A retrieval set is one element (dataset, ""): mean recall@5 of its train split, and 0. Raises UserError for missing data
    and for a class without train images.
    """
    found: dict[Element, tuple[float, float]] = {}
    for name in names:
        scores = subject.kept("scores", [name], lambda name=name: _scores(subject, name))  # type: ignore[misc]
        for element, (accuracy, log_probability) in zip(_elements(subject, name), scores, strict=True):
            found[element] = (float(accuracy), float(log_probability))
    return found


def class_embeddings(subject: Subject, names: Sequence[str]) -> dict[Element, np.ndarray]:
    """Unit vectors float32 [d] by (dataset, class): the column of the class in open_clip's zero-shot classifier.

    A retrieval set is one element (dataset, ""): the normalised mean over all captions of its train split.
    """
    found: dict[Element, np.ndarray] = {}
    for name in names:
        vectors = subject.kept("embeddings", [name], lambda name=name: _embeddings(subject, name))  # type: ignore[misc]
        found.update(zip(_elements(subject, name), vectors, strict=True))
    return found


def class_places(subject: Subject, names: Sequence[str]) -> dict[Element, int]:
    """The place (from 0) of every class on the greedy path through all classes; it does not depend on the order of `names`."""
    names = sorted(names)
    elements = [element for name in names for element in _elements(subject, name)]

    def path() -> np.ndarray:
        return greedy_path(np.stack([*class_embeddings(subject, names).values()]))

    order = subject.kept("path", names, path)
    return {elements[at]: place for place, at in enumerate(order)}


def greedy_path(vectors: np.ndarray) -> np.ndarray:
    """The shortest greedy walk through `vectors` [n, d], as an order int64 [n] of them.

    A greedy walk goes to the nearest vector that was not visited yet. Nearest is the largest cosine; the length of a walk is the sum of
    1 - cosine; of equal vectors or walks, the first is taken. Up to 1,024 vectors every one is tried as a start. Beyond that,
    max(32, 2^30 // n^2) evenly spaced ones are tried, since a walk costs n^2 (our convention). Needs 4 n^2 bytes: 1.4 GB for the
    18,381 classes of FoMo-in-Flux. Raises UserError for a vector that is zero or not finite.
    """
    similar = _similarities(np.asarray(vectors, np.float64))
    best, nearness = np.arange(len(vectors)), -math.inf
    for start in starts(len(vectors)):
        walk, total = _walk(similar, int(start))
        if total > nearness:
            best, nearness = walk, total
    return best


def _walk(similar: np.ndarray, at: int) -> tuple[np.ndarray, float]:
    """The greedy walk from `at`, and the sum of the cosines along it."""
    walk, total = np.full(len(similar), at, np.int64), 0.0
    barred, near = np.zeros(len(similar), np.float32), np.empty(len(similar), np.float32)
    for step in range(1, len(similar)):
        barred[at] = -np.inf
        np.add(similar[at], barred, out=near)
        walk[step] = at = int(near.argmax())
        total += float(near[at])
    return walk, total


def starts(count: int) -> np.ndarray:
    """The starts of walks through `count` elements: all elements, or evenly spaced ones if all would take too long."""
    tried = min(count, max(LEAST_STARTS, STEPS // max(count, 1) ** 2))
    return np.arange(tried) * count // max(tried, 1)


def _similarities(vectors: np.ndarray) -> np.ndarray:
    """Cosines float32 [n, n]. Coordinates are rounded to a grid, so any BLAS gives the same bits, and equal pairs equal cosines."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or not norms.all():
        raise UserError(
            "the embedding of a class is zero or not finite, so classes have no similarity; take another base or order"
        )
    grid = np.rint(vectors / norms * GRID)
    similar = np.empty((len(grid), len(grid)), np.float32)
    for start in range(0, len(grid), 1024):
        similar[start : start + 1024] = grid[start : start + 1024] @ grid.T / GRID**2
    return similar


def _elements(subject: Subject, name: str) -> list[Element]:
    info = subject.info(name)
    return [(name, label) for label in (info.classes if info.kind == "classification" else (WHOLE,))]


def _scores(subject: Subject, name: str) -> np.ndarray:
    """float64 [classes, 2]: accuracy and mean log-probability; [1, 2] for a retrieval set."""
    import torch

    from workers.scoring.evaluate import retrieval

    samples, encoder = subject.samples(name), subject.encoder
    with torch.inference_mode():
        if samples.kind == "retrieval":
            return np.array([[retrieval(encoder, samples, np.arange(len(samples))), 0.0]])
        classifier = encoder.classifier(samples.classes, samples.templates)
        scale = float(encoder.model.logit_scale.exp())
        right, likely = np.zeros(len(samples)), np.zeros(len(samples))
        start = 0
        for features in encoder.images(samples, np.arange(len(samples))):
            rows = slice(start, start := start + len(features))
            labels = torch.tensor(samples.labels[rows], device=encoder.device)
            logits = scale * features @ classifier
            right[rows] = (logits.argmax(dim=1) == labels).cpu().numpy()
            likely[rows] = logits.log_softmax(dim=1).gather(1, labels[:, None])[:, 0].double().cpu().numpy()
    return _by_class(samples, right, likely)


def _by_class(samples: "Samples", *values: np.ndarray) -> np.ndarray:
    """Means of each of `values` [N] over the images of every class, [classes, len(values)]."""
    size = len(samples.classes)
    counts = np.bincount(samples.labels, minlength=size)
    if not counts.all():
        empty = [samples.classes[label] for label in np.flatnonzero(counts == 0)]
        raise UserError(
            f"dataset {samples.name!r} has no {SPLIT} image of {len(empty)} of its classes ({', '.join(empty[:5])}), so the "
            "base has no score for them; take another order, or a stream of your own (stream.file)"
        )
    sums = [np.bincount(samples.labels, weights=value, minlength=size) for value in values]
    return np.stack(sums, axis=1) / counts[:, None]


def _embeddings(subject: Subject, name: str) -> np.ndarray:
    """float32 [classes, d]; [1, d] for a retrieval set."""
    import torch

    encoder, info = subject.encoder, subject.info(name)
    with torch.inference_mode():
        if info.kind == "classification":
            return encoder.classifier(info.classes, info.templates).T.cpu().numpy().astype(np.float32)
        texts = [caption for captions in subject.samples(name).captions for caption in captions]
        parts = (
            encoder.texts(texts[start : start + encoder.batch_size])
            for start in range(0, len(texts), encoder.batch_size)
        )
        mean = sum(part.double().sum(dim=0) for part in parts).cpu().numpy()  # type: ignore[union-attr]
    return (mean / np.linalg.norm(mean))[None].astype(np.float32)
