"""How good a checkpoint is: zero-shot accuracy and retrieval recall, in fp32 unless asked otherwise, on decoded images.

Invariant: a score is what plain open_clip gives for the same pictures as people see them (`data.pictures`) - its preprocessing, its
classifier builder, argmax over all classes of the dataset - and depends on the weights, the data, the fraction and the seed alone.
"""

import json
import math
import time
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip import build_zero_shot_classifier
from torch.nn.functional import normalize

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.errors import NonFiniteCheckpoint, UserError
from workers.data.contents import is_by_caption
from workers.data.decode import Samples, height_and_width, load
from workers.data.manifest import describe, split_of
from workers.data.seen import reads_encoded
from workers.feed.device import device_of
from workers.feed.pixels import Pixels
from workers.feed.ring import InOrder, feed
from workers.jobs import EvaluateJob, EvaluateResult, Source
from workers.models.model import load as load_model
from workers.models.model import preprocess_cfg, tokenizer
from workers.models.weights import open_weights
from workers.scoring.details import ANSWERS, Tally, packed
from workers.scoring.kept import KEPT, MOST_BYTES, Kept, tower_digests

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
DECODED_BYTES = 20 * 10**9  # of splits that are read as they are stored and scored again and again
TOP = 5  # recall@5, and the five most likely classes
PROMPTS = 256  # through the text tower at once
LEAST_SAMPLES, LEAST_PER_CLASS = 300, 2  # of a subset: FoMo-in-Flux's own floors


def evaluate(job: EvaluateJob) -> EvaluateResult:
    """Score one weights directory on every dataset of the job.

    A classification set scores top-1 accuracy over all its classes, a retrieval set the mean of recall@5 image -> text and text -> image.
    With `job.details` the answer has details (see `details.py`).
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
    answer: EvaluateResult = {
        "scores": {name: one.score for name, one in found.items()},
        "samples": {name: one.samples for name, one in found.items()},
        "seconds": time.perf_counter() - started,
    }
    if job.details:
        answer["details"] = {name: dict(one.details) for name, one in found.items()}
    return answer


@dataclass(frozen=True)
class _Scored:
    score: float
    samples: int
    details: Mapping[str, Any]


def _scores(job: EvaluateJob) -> dict[str, _Scored]:
    directory = Path(job.model)
    encoder = Encoder(directory, job.device, job.batch_size, job.loaders, job.precision)
    found = {}
    for source in _as_read(job, encoder.preprocess["size"]):
        samples = load(source, encoder.preprocess["size"], job.cache, encoder.preprocess)
        if not len(samples):
            raise UserError(f"dataset {source.dataset!r}: the {source.split} split holds no sample to score")
        rows = subset(samples, job.fraction, job.seed)
        try:
            found[source.dataset] = _scored(encoder, samples, rows, job.details)
        except FloatingPointError as error:
            raise NonFiniteCheckpoint(
                f"{job.label} ({directory}): {error} on dataset {source.dataset!r}; {_blame(directory, job.precision)}"
            ) from error
    return found


def _as_read(job: EvaluateJob, size: int | Sequence[int]) -> Iterator[Source]:
    """The splits of a job; what is read as it is stored is decoded once, as long as `DECODED_BYTES` have room for it."""
    left = DECODED_BYTES
    for source in job.datasets:
        samples = split_of(describe(source.root, source.dataset, job.cache), source.split).samples
        takes = samples * math.prod((*height_and_width(size), 3))
        if reads_encoded(source.reading, samples) and takes <= left:
            left -= takes
            yield replace(source, reading="decoded")
        else:
            yield source


def _scored(encoder: "Encoder", samples: Samples, rows: np.ndarray, asked: Sequence[str]) -> _Scored:
    if samples.kind == "classification":
        tally = classified(encoder, samples, rows)
        return _Scored(tally.top1, len(rows), tally.details(asked, samples.classes))
    ways = found_by(encoder, samples, rows)
    to_text, to_image = (_share(way) for way in ways)
    details: dict[str, object] = {"image_to_text": to_text, "text_to_image": to_image}
    if ANSWERS in asked:
        details[ANSWERS] = [packed(way) for way in ways]
    return _Scored((to_text + to_image) / 2, len(rows), details)


class Encoder:
    """A model with its preprocessing and tokenizer: images and texts to normalised fp32 features on the CPU or GPU.

    `weights` is a file to take in place of the directory's own; nothing of it is kept for other models.
    """

    def __init__(
        self,
        directory: Path,
        device: str,
        batch_size: int,
        loaders: int = 1,
        precision: str = "fp32",
        weights: Path | None = None,
    ) -> None:
        self._feeding = device_of(device)
        self._half = AUTOCAST.get(precision)
        self.device, self.batch_size, self._loaders = self._feeding.place, batch_size, loaders
        self.model: Any = load_model(directory, self.device, weights)
        self._kept = KEPT if weights is None else Kept(0)
        self._towers = tower_digests(directory) if weights is None else dict[str, str]()
        self.preprocess = preprocess_cfg(directory)
        self._pixels = Pixels(self.preprocess, self.device)
        self._tokenizer = tokenizer(directory)

    def images(self, samples: Samples, rows: np.ndarray) -> Iterator[torch.Tensor]:
        """Features [b, d] of the pictures `rows` of a split, batch by batch; raises FloatingPointError after the last one."""
        name = self._name("image", samples, rows.tobytes())
        if (known := self._kept.get(name)) is not None:
            yield from known.split(self.batch_size)
            return
        shares, finite = InOrder(samples, rows, self.batch_size), torch.tensor(True, device=self.device)
        found, held = [], 0
        with closing(feed(shares, self._pixels, self._feeding, shares.steps, self._loaders)) as batches:
            for _, batch in batches:
                features = self._encoded(self.model.encode_image, batch.images)
                finite = finite & torch.isfinite(features).all()
                held += features.nbytes
                found += [features] if held <= MOST_BYTES else []
                yield features
        if not bool(finite):
            raise FloatingPointError("the features of images are not finite")
        if found and held <= MOST_BYTES:
            self._kept.put(name, torch.cat(found))

    def pictures(self, images: np.ndarray) -> torch.Tensor:
        """Features [N, d] of pictures in memory, uint8 [N, H, W, 3], in one batch; they may be not finite."""
        features: torch.Tensor = self.model.encode_image(
            self._pixels(torch.from_numpy(images).to(self.device)), normalize=True
        )
        return features

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Features [N, d]."""
        return self._kept_texts(self._name("text", tuple(texts)), lambda: self._of_texts(texts), "texts")

    def classifier(self, classes: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
        """open_clip's zero-shot classifier [d, classes]: the normalised mean over templates of the normalised features."""
        name = self._name("text", tuple(classes), tuple(templates))
        return self._kept_texts(name, lambda: self._of_classes(classes, templates), "class names")

    def encode_text(self, tokens: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        """Normalised features [N, d] of tokens, as open_clip calls it."""
        assert normalize
        return self._encoded(self.model.encode_text, tokens)

    def _of_texts(self, texts: Sequence[str]) -> torch.Tensor:
        starts = range(0, len(texts), self.batch_size)
        return torch.cat([self.encode_text(self.tokens(texts[at : at + self.batch_size])) for at in starts])

    def _of_classes(self, classes: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
        prompts: list[Callable[[str], str]] = [partial(template.replace, "{c}") for template in templates]
        at_once = max(1, PROMPTS // len(templates))
        found: torch.Tensor = build_zero_shot_classifier(
            self, self.tokens, classes, prompts, num_classes_per_batch=at_once, device=self.device
        )
        return found

    def _encoded(self, encode: Callable[..., torch.Tensor], given: torch.Tensor) -> torch.Tensor:
        """Normalised fp32 features, whatever the towers compute in."""
        if self._half is None:
            return encode(given, normalize=True)
        with torch.autocast(self.device.type, dtype=self._half):
            found = encode(given, normalize=False)
        return normalize(found.float(), dim=-1)

    def _kept_texts(self, name: Hashable, make: Callable[[], torch.Tensor], of: str) -> torch.Tensor:
        known = self._kept.get(name)
        if known is None:
            known = _finite(make(), f"the features of {of} are not finite")
            self._kept.put(name, known)
        return known

    def _name(self, tower: str, *given: Hashable) -> Hashable:
        """Of what a tower makes of something: all that bears on its bits."""
        how = (str(self.device), self._half, self.batch_size, torch.get_num_threads())
        more = json.dumps(self.preprocess, sort_keys=True, default=str)
        return (self._towers.get(tower), tower, how, more, self._tokenizer, *given)

    def tokens(self, texts: Sequence[str]) -> torch.Tensor:
        """Tokens [N, context] on the model's device."""
        return self._tokenizer(texts).to(self.device)


def heads_of(directory: Path, named: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[np.ndarray]:
    """Class embeddings [classes, d] by the model of a directory, for each pair of classes and templates."""
    encoder = Encoder(directory, "cpu", PROMPTS)
    with torch.inference_mode():
        return [encoder.classifier(classes, templates).T.numpy() for classes, templates in named]


def classified(encoder: Encoder, samples: Samples, rows: np.ndarray) -> Tally:
    """What the samples were taken for, over all classes of the dataset."""
    classifier = encoder.classifier(samples.classes, samples.templates)
    found, nearest = [], []
    for features in encoder.images(samples, rows):
        logits = 100.0 * features @ classifier
        found.append(logits.argmax(dim=1))
        nearest.append(logits.topk(min(TOP, len(samples.classes)), dim=1).indices)
    labels = samples.labels[rows]
    taken, taken_for = np.zeros((len(samples.classes),) * 2, np.int64), torch.cat(found).cpu().numpy()
    np.add.at(taken, (labels, taken_for), 1)
    among = (torch.cat(nearest).cpu().numpy() == labels[:, None]).any(axis=1)
    return Tally(taken, int(among.sum()), taken_for == labels)


def retrieval(encoder: Encoder, samples: Samples, rows: np.ndarray) -> float:
    """Mean of recall@5 in both directions (`recalls`)."""
    return sum(recalls(encoder, samples, rows)) / 2


def recalls(encoder: Encoder, samples: Samples, rows: np.ndarray) -> tuple[float, float]:
    """Recall@5 from image to text and from text to image (`found_by`)."""
    to_text, to_image = found_by(encoder, samples, rows)
    return _share(to_text), _share(to_image)


def found_by(encoder: Encoder, samples: Samples, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which images find a caption of theirs among the five nearest, and which captions their image: boolean [images], [captions].

    An image is found by any of its captions, and any of them counts for it.

    In a split with a sample for each caption (`is_by_caption`), samples of the same picture are one image.
    """
    same = np.asarray(samples.pictures)
    pictures = same if is_by_caption(same.tolist()) else np.arange(len(samples))
    _, first, image_of = np.unique(pictures[rows], return_index=True, return_inverse=True)
    shown = rows[np.sort(first)]
    place = np.argsort(np.argsort(first))[image_of]  # images stay in the order of the rows
    images = torch.cat(list(encoder.images(samples, shown)))
    texts = [caption for row in rows for caption in samples.captions[row]]
    owners = torch.tensor(
        [int(place[at]) for at, row in enumerate(rows) for _ in samples.captions[row]], device=images.device
    )
    places = torch.arange(len(shown), device=images.device)
    captions = encoder.texts(texts)
    to_text = _found(images, captions, places, owners, encoder.batch_size)
    to_image = _found(captions, images, owners, places, encoder.batch_size)
    return to_text, to_image


def _share(found: np.ndarray) -> float:
    return int(found.sum()) / len(found)


def _found(
    queries: torch.Tensor, items: torch.Tensor, wanted: torch.Tensor, owners: torch.Tensor, batch_size: int
) -> np.ndarray:
    """Which queries have an item of the right owner among the five nearest."""
    hits = []
    for start in range(0, len(queries), batch_size):
        similar = queries[start : start + batch_size] @ items.T
        nearest = similar.topk(min(TOP, len(items)), dim=1).indices
        hits.append((owners[nearest] == wanted[start : start + batch_size, None]).any(dim=1).cpu().numpy())
    return np.concatenate(hits)


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


def _blame(directory: Path, precision: str) -> str:
    """What of the weights gave features that are not finite."""
    with open_weights(directory / WEIGHTS_FILE) as checkpoint:
        for name, info in checkpoint.tensors.items():
            if info.kind.is_float and not np.isfinite(checkpoint.read(name)).all():
                return f"its tensor {name} holds numbers that are not finite"
    if precision == "fp16":
        return "its weights are finite; score it with evaluation.precision bf16 or fp32"
    return "its weights are finite but too large to use"


def _finite(features: torch.Tensor, complaint: str) -> torch.Tensor:
    if not bool(torch.isfinite(features).all()):
        raise FloatingPointError(complaint)
    return features
