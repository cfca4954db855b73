"""How good a checkpoint is: zero-shot accuracy and retrieval recall, in fp32, on decoded images.

Invariant: a score is what plain open_clip gives for the same pictures as people see them (`data.pictures`) - its preprocessing, its
classifier builder, argmax over all classes of the dataset - and depends on the weights, the data, the fraction and the seed alone.
"""

import math
import time
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip import build_zero_shot_classifier

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.errors import NonFiniteCheckpoint, UserError
from workers.data.contents import is_by_caption
from workers.data.decode import Samples, load, normalise
from workers.jobs import EvaluateJob
from workers.models.model import load as load_model
from workers.models.model import preprocess_cfg, tokenizer
from workers.models.weights import open_weights

TOP = 5  # recall@5
PROMPTS = 256  # through the text tower at once
LEAST_SAMPLES, LEAST_PER_CLASS = 300, 2  # of a subset: FoMo-in-Flux's own floors


def evaluate(job: EvaluateJob) -> dict[str, Any]:
    """Score one weights directory on every dataset of the job.

    Returns {"scores": {dataset: fraction in [0, 1]}, "samples": {dataset: images used}, "seconds"}. A classification set
    scores top-1 accuracy over all its classes, a retrieval set the mean of recall@5 image -> text and text -> image.
    Raises UserError for missing or unfit weights and data, NonFiniteCheckpoint when features are not finite.
    """
    started = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(job.threads)
    try:
        with torch.inference_mode():
            found = _scores(job)
    finally:
        torch.set_num_threads(threads)
    scores = {name: score for name, (score, _) in found.items()}
    used = {name: count for name, (_, count) in found.items()}
    return {"scores": scores, "samples": used, "seconds": time.perf_counter() - started}


def _scores(job: EvaluateJob) -> dict[str, tuple[float, int]]:
    directory = Path(job.model)
    encoder = Encoder(directory, job.device, job.batch_size)
    found = {}
    for source in job.datasets:
        samples = load(source, encoder.preprocess["size"], job.cache, encoder.preprocess)
        if not len(samples):
            raise UserError(f"dataset {source.dataset!r}: the {source.split} split holds no sample to score")
        rows = subset(samples, job.fraction, job.seed)
        score = classification if samples.kind == "classification" else retrieval
        try:
            found[source.dataset] = (score(encoder, samples, rows), len(rows))
        except FloatingPointError as error:
            raise NonFiniteCheckpoint(
                f"{job.label} ({directory}): {error} on dataset {source.dataset!r}; {_blame(directory)}"
            ) from error
    return found


class Encoder:
    """A model with its preprocessing and tokenizer: images and texts to normalised fp32 features on the CPU or GPU."""

    def __init__(self, directory: Path, device: str, batch_size: int) -> None:
        self.model: Any = load_model(directory, device)
        self.preprocess = preprocess_cfg(directory)
        self.device, self.batch_size = device, batch_size
        self._tokenizer = tokenizer(directory)

    def images(self, images: Any) -> torch.Tensor:
        """Features [N, d] of uint8 images [N, H, W, 3]."""
        pixels = normalise(images, self.preprocess["mean"], self.preprocess["std"]).to(self.device)
        return _finite(
            self.model.encode_image(pixels, normalize=True), "the features of images are not finite"
        )

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Features [N, d]."""
        parts = [
            self.model.encode_text(self.tokens(texts[start : start + self.batch_size]), normalize=True)
            for start in range(0, len(texts), self.batch_size)
        ]
        return _finite(torch.cat(parts), "the features of texts are not finite")

    def classifier(self, classes: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
        """open_clip's zero-shot classifier [d, classes]: the normalised mean over templates of the normalised features."""
        prompts: list[Callable[[str], str]] = [partial(template.replace, "{c}") for template in templates]
        at_once = max(1, PROMPTS // len(templates))
        weights = build_zero_shot_classifier(
            self.model, self.tokens, classes, prompts, num_classes_per_batch=at_once, device=self.device
        )
        return _finite(weights, "the features of class names are not finite")

    def tokens(self, texts: Sequence[str]) -> torch.Tensor:
        """Tokens [N, context] on the model's device."""
        return self._tokenizer(texts).to(self.device)


def classification(encoder: Encoder, samples: Samples, rows: np.ndarray) -> float:
    """Top-1 accuracy over all classes of the dataset."""
    classifier = encoder.classifier(samples.classes, samples.templates)
    right = 0
    for start in range(0, len(rows), encoder.batch_size):
        batch = rows[start : start + encoder.batch_size]
        logits = 100.0 * encoder.images(samples.images[_span(batch)]) @ classifier
        labels = torch.from_numpy(samples.labels[batch])
        right += int((logits.argmax(dim=1).cpu() == labels).sum())
    return right / len(rows)


def retrieval(encoder: Encoder, samples: Samples, rows: np.ndarray) -> float:
    """Mean of recall@5 in both directions; an image is found by any of its captions, and any of them counts for it.

    In a split with a sample for each caption (`is_by_caption`), samples of the same picture are one image.
    """
    pictures = samples.pictures if is_by_caption(samples.pictures.tolist()) else np.arange(len(samples))
    _, first, image_of = np.unique(pictures[rows], return_index=True, return_inverse=True)
    shown = rows[np.sort(first)]
    place = np.argsort(np.argsort(first))[image_of]  # images stay in the order of the rows
    images = torch.cat(
        [
            encoder.images(samples.images[_span(shown[start : start + encoder.batch_size])])
            for start in range(0, len(shown), encoder.batch_size)
        ]
    )
    texts = [caption for row in rows for caption in samples.captions[row]]
    owners = torch.tensor(
        [int(place[at]) for at, row in enumerate(rows) for _ in samples.captions[row]], device=images.device
    )
    places = torch.arange(len(shown), device=images.device)
    captions = encoder.texts(texts)
    to_text = _recall(images, captions, places, owners, encoder.batch_size)
    to_image = _recall(captions, images, owners, places, encoder.batch_size)
    return (to_text + to_image) / 2


def _recall(
    queries: torch.Tensor, items: torch.Tensor, wanted: torch.Tensor, owners: torch.Tensor, batch_size: int
) -> float:
    """Share of queries with an item of the right owner among the five nearest."""
    hits = 0
    for start in range(0, len(queries), batch_size):
        similar = queries[start : start + batch_size] @ items.T
        nearest = similar.topk(min(TOP, len(items)), dim=1).indices
        hits += int((owners[nearest] == wanted[start : start + batch_size, None]).any(dim=1).sum())
    return hits / len(queries)


def subset(samples: Samples, fraction: float, seed: int) -> np.ndarray:
    """Rows to score, ascending: all for fraction 1, else a seeded subset with as equal a share per class as there is.

    Follows FoMo-in-Flux: `fraction` of the samples but at least 300, and at least two of every class that has two.
    Without classes (retrieval) the subset is drawn from all samples alike. Depends on the labels, fraction and seed alone.
    """
    classes = samples.kind == "classification"
    return _subset(samples.name, samples.labels.tobytes(), classes, fraction, seed)


@lru_cache(maxsize=256)
def _subset(name: str, labels_of: bytes, classes: bool, fraction: float, seed: int) -> np.ndarray:
    every = np.frombuffer(labels_of, np.int64)
    total = len(every)
    wanted = max(math.ceil(fraction * total), min(LEAST_SAMPLES, total))
    if wanted >= total:
        return np.arange(total)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    order = rng.permutation(total)
    labels = every[order]
    rank = np.zeros(total, np.int64)  # the how-manieth of its class a sample is, in the drawn order
    for label in np.unique(labels):
        of_label = labels == label
        rank[of_label] = np.arange(of_label.sum())
    chosen = np.lexsort((np.arange(total), rank))[:wanted]
    if classes:
        chosen = np.union1d(chosen, np.flatnonzero(rank < LEAST_PER_CLASS))
    return np.sort(order[chosen])


def _span(rows: np.ndarray) -> Any:
    """The rows as a slice where they are consecutive: a memory map then gives a view, not a copy row by row."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def _blame(directory: Path) -> str:
    """What of the weights gave features that are not finite."""
    with open_weights(directory / WEIGHTS_FILE) as checkpoint:
        for name, info in checkpoint.tensors.items():
            if info.kind.is_float and not np.isfinite(checkpoint.read(name)).all():
                return f"its tensor {name} holds numbers that are not finite"
    return "its weights are finite but too large to use"


def _finite(features: torch.Tensor, complaint: str) -> torch.Tensor:
    if not bool(torch.isfinite(features).all()):
        raise FloatingPointError(complaint)
    return features
