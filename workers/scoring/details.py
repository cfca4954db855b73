"""Details of a classification score: top-5, mean per class, score of each class, confusions.

One number per dataset does not show which classes a model confuses.
Invariant: every detail follows from counts over the scored samples; classes without a sample count in no mean.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

TOP5, MEAN_PER_CLASS, PER_CLASS, CONFUSION = DETAILS = ("top5", "mean_per_class", "per_class", "confusion")
"""The details that can be requested besides the score. `mean_per_class` is the mean of the accuracies of all classes (balanced accuracy),
the usual metric of Pets, Flowers and FGVC-Aircraft."""
ANSWERS = "answers"
"""Right or wrong for every sample, in the order of the split: what a paired comparison of two models needs. A list of `packed` arrays,
one for each direction of a retrieval set. Only the live service asks for it."""


class Packed(TypedDict):
    """Answers to `samples` samples, eight to a byte, in base64."""

    samples: int
    bits: str


def packed(right: np.ndarray) -> Packed:
    """One bit for each sample of a boolean array [n]."""
    return {"samples": int(right.size), "bits": base64.b64encode(np.packbits(right).tobytes()).decode()}


def unpacked(answers: Packed) -> np.ndarray:
    """The boolean array [n] of what `packed` gives. Raises ValueError if its length is wrong."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(answers["bits"], validate=True), np.uint8))
    if not 0 <= answers["samples"] <= bits.size < answers["samples"] + 8:
        raise ValueError(f"{bits.size} bits are not the answers to {answers['samples']} samples")
    return bits[: answers["samples"]].astype(bool)


@dataclass(frozen=True)
class Tally:
    """Counts over the scored samples: the confusion matrix `taken`, integers [classes, classes] (row: true class, column: predicted class),
    and `among`, the number of samples whose class is among the five most likely ones. `right` [samples]
    has for each sample whether its class was found."""

    taken: np.ndarray
    among: int
    right: np.ndarray

    @property
    def top1(self) -> float:
        """Accuracy: the share of correctly classified samples."""
        return float(int(np.trace(self.taken)) / int(self.taken.sum()))

    def details(self, asked: Sequence[str], classes: Sequence[str]) -> dict[str, object]:
        """The details of `asked`: shares in [0, 1]; per_class as {class: {"score", "samples"}}; confusion as [true class, predicted class,
        samples] of every misclassification that occurs, the most frequent first."""
        samples = self.taken.sum(axis=1)
        there = samples > 0
        right = np.diag(self.taken)
        found: dict[str, object] = {
            TOP5: self.among / int(samples.sum()),
            MEAN_PER_CLASS: float(np.mean(right[there] / samples[there])),
            PER_CLASS: {
                name: {"score": float(right[at] / samples[at]), "samples": int(samples[at])}
                for at, name in enumerate(classes)
                if there[at]
            },
            CONFUSION: self._confused(classes),
            ANSWERS: [packed(self.right)],
        }
        return {name: found[name] for name in (*DETAILS, ANSWERS) if name in asked}

    def _confused(self, classes: Sequence[str]) -> list[list[Any]]:
        wrong = self.taken - np.diag(np.diag(self.taken))
        pairs = sorted(zip(*np.nonzero(wrong)), key=lambda pair: (-wrong[pair], pair))
        return [[classes[true], classes[taken], int(wrong[true, taken])] for true, taken in pairs]
