"""One set of weights, ready to answer: the model, where it comes from, and the classifiers of label sets.

Invariant: a snapshot never changes what it answers, and everything of one answer comes from one snapshot. Weights are used only if the
file has the sha256 that was promised, fits the model, and holds finite numbers that give finite features.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from merge_service.checkpoints import sha256_of
from merge_service.errors import CheckpointError, IncompatibleCheckpoint, UserError
from workers.data.decode import height_and_width
from workers.scoring.evaluate import Encoder
from workers.serving.labels import LabelSet
from workers.serving.served import Served

CLASSIFIER_NUMBERS = 32_000_000
"""Of all classifiers that a snapshot keeps, 128 MB; the one that was not used for longest is given up first."""
CLASSIFIERS = 256
"""The most that it keeps."""
PROMPTS_AT_ONCE = 256


class WeightsRefused(Exception):
    """Weights that cannot be served: `code` is weights.missing, .sha256, .damaged, .unfit, .not_finite or .failed."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code, detail)
        self.code, self.detail = code, detail

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


@dataclass(frozen=True, eq=False)
class Work:
    """What one request asks: pictures uint8 [n, H, W, 3] or texts, and with `labels` what the pictures show. Its parts are answered
    by one model, in one batch."""

    images: np.ndarray | None = None
    texts: tuple[str, ...] = ()
    labels: LabelSet | None = None

    @property
    def size(self) -> int:
        """Pictures and texts."""
        return len(self.texts) + (0 if self.images is None else len(self.images))


@dataclass(frozen=True, eq=False)
class Answer:
    """`values` float32: with labels the probabilities [n, labels], else normalised features [n, d]; and which weights gave them."""

    served: Served
    values: np.ndarray


class Snapshot:
    """The weights of `served` in the model of the directory `home`, whose configuration and tokenizer are used.

    Raises WeightsRefused.
    """

    def __init__(self, home: Path, served: Served, device: str = "cpu") -> None:
        self.served = served
        try:
            before = _stamp(served.path)
            if sha256_of(served.path) != served.sha256:
                raise WeightsRefused("weights.sha256", f"{served.path} does not hold what was promoted")
            self._encoder = Encoder(home, device, PROMPTS_AT_ONCE, weights=served.path)
            if _stamp(served.path) != before:
                raise WeightsRefused("weights.sha256", f"{served.path} changed while it was read")
        except FileNotFoundError:
            raise WeightsRefused("weights.missing", f"{served.path} is not there") from None
        except IncompatibleCheckpoint as error:
            raise WeightsRefused("weights.unfit", str(error)) from error
        except CheckpointError as error:
            raise WeightsRefused("weights.damaged", str(error)) from error
        except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            raise WeightsRefused("weights.failed", f"{served.path}: {error}") from error
        self._classifiers: OrderedDict[str, tuple[LabelSet, torch.Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def warm(self, labels: Sequence[LabelSet], batch: int) -> None:
        """Answer a batch of grey pictures and embed these label sets, so that the first request is not slow. Raises WeightsRefused."""
        wrong = [
            name
            for name, tensor in self._encoder.model.state_dict().items()
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
        ]
        if wrong:
            raise WeightsRefused("weights.not_finite", f"{self.served.path}: {wrong[0]} is not finite")
        height, width = height_and_width(self._encoder.preprocess["size"])
        grey = np.full((batch, height, width, 3), 128, np.uint8)
        try:
            for found in self.answer([Work(images=grey), Work(texts=("",))]):
                if isinstance(found, Exception):
                    raise found
            for one in labels:
                self.classifier(one)
        except FloatingPointError as error:
            raise WeightsRefused("weights.not_finite", f"{self.served.path}: {error}") from None
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise WeightsRefused("weights.failed", f"{self.served.path}: {error}") from error

    def classifier(self, labels: LabelSet) -> torch.Tensor:
        """open_clip's zero-shot classifier [d, labels], as evaluation uses it. Threads may ask at once. Raises FloatingPointError."""
        with self._lock:
            if labels.digest in self._classifiers:
                self._classifiers.move_to_end(labels.digest)
                return self._classifiers[labels.digest][1]
        with torch.inference_mode():
            made = self._encoder.classifier(labels.names, labels.templates)
        with self._lock:
            self._classifiers[labels.digest] = (labels, made)
            while len(self._classifiers) > CLASSIFIERS or (
                len(self._classifiers) > 1 and self._numbers() > CLASSIFIER_NUMBERS
            ):
                self._classifiers.popitem(last=False)
        return made

    def knows(self, labels: LabelSet) -> bool:
        """Whether `classifier` answers at once."""
        return labels.digest in self._classifiers

    def known(self) -> list[LabelSet]:
        """The label sets whose classifiers are kept, the one used last at the end."""
        with self._lock:
            return [labels for labels, _ in self._classifiers.values()]

    def answer(self, works: Sequence[Work]) -> list[Answer | Exception]:
        """Answers of one batch in the order of the works; FloatingPointError in the place of one that is not finite."""
        with torch.inference_mode():
            shown = [work.images for work in works if work.images is not None]
            texts = [text for work in works for text in work.texts]
            seen = self._encoder.pictures(np.concatenate(shown)) if shown else None
            read = self._features(texts) if texts else None
            found: list[Answer | Exception] = []
            image = text = 0
            for work in works:
                count = 0 if work.images is None else len(work.images)
                features = (
                    seen[image : image + count]
                    if count and seen is not None
                    else read[text : text + len(work.texts)]  # type: ignore[index]
                )
                image, text = image + count, text + len(work.texts)
                found.append(self._one(features, work.labels))
        return found

    def _one(self, features: torch.Tensor, labels: LabelSet | None) -> Answer | Exception:
        try:
            if labels is not None:
                scale = self._encoder.model.logit_scale.exp()
                features = (scale * features @ self.classifier(labels)).softmax(dim=1)
            if not bool(torch.isfinite(features).all()):
                raise FloatingPointError("the model gave numbers that are not finite")
        except FloatingPointError as error:
            return error
        return Answer(self.served, features.float().cpu().numpy())

    def _features(self, texts: Sequence[str]) -> torch.Tensor:
        encoder = self._encoder
        features: torch.Tensor = encoder.model.encode_text(encoder.tokens(texts), normalize=True)
        return features

    def _numbers(self) -> int:
        return sum(made.numel() for _, made in self._classifiers.values())


def _stamp(path: Path) -> tuple[int, int, int]:
    state = path.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns
