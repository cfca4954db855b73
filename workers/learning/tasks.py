"""The tasks that a merge learns from: their images in batches, and the class scores of a model on them.

Invariant: the batch of a task at a step depends on seed, step and number of the task, and on nothing that happened before.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from merge_service.errors import UserError
from workers.evidence.asked import Inputs
from workers.evidence.network import Opened
from workers.evidence.passes import CHUNK, Classifier, check, encode_texts
from workers.learning.wanted import Wanted


@dataclass(frozen=True)
class Task:
    """One task. `head` are class embeddings [C, d], None where they pass the text tower of the model that learns."""

    number: int
    inputs: Inputs
    head: torch.Tensor | None
    scale: float

    @property
    def size(self) -> int:
        """How many images it has."""
        return len(self.inputs.images)

    @property
    def classes(self) -> int:
        """How many classes it has."""
        return len(self.head if self.head is not None else self.inputs.tokens)

    def rows(self, wanted: Wanted, step: int) -> np.ndarray:
        """The images of a step, in ascending order; all of them where a batch is no smaller."""
        if self.size <= wanted.batch_size:
            return np.arange(self.size)
        rng = np.random.default_rng([wanted.seed, step, self.number])
        return np.sort(rng.choice(self.size, wanted.batch_size, replace=False))

    def images(self, model: Opened, rows: np.ndarray) -> torch.Tensor:
        """Images as the model takes them, on its device."""
        return model.images(replace(self.inputs, images=self.inputs.images[rows])).to(model.device)

    def labels(self, rows: np.ndarray) -> torch.Tensor:
        """Their labels."""
        return torch.from_numpy(np.asarray(self.inputs.labels, np.int64)[rows])

    def log_p(self, model: Opened, images: torch.Tensor, head: torch.Tensor | None = None) -> torch.Tensor:
        """log p(y | x), float32 [N, C]; `head` in place of the task's own."""
        own = self.head if head is None else F.normalize(head, dim=1)
        tokens = None if own is not None else model.tokens(self.inputs)
        scores = Classifier(model, own, self.scale, tokens)
        found = scores.log_probabilities(images, scores.embeddings())
        check(f"task {self.number}", found)
        return found

    def all_log_p(self, model: Opened) -> torch.Tensor:
        """log p of every image, on the CPU."""
        with torch.no_grad():
            parts = np.array_split(np.arange(self.size), -(-self.size // CHUNK))
            return torch.cat([self.log_p(model, self.images(model, rows)).cpu() for rows in parts])

    def digest(self) -> str:
        """Of everything that it holds."""
        found = hashlib.sha256()
        held = (self.inputs.images, self.inputs.labels, self.inputs.tokens, self.inputs.head)
        for array in held:
            if array is not None:
                found.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return found.hexdigest()


def tasks_of(wanted: Wanted, model: Opened, inputs: Sequence[Inputs], scale: float) -> list[Task]:
    """The tasks of arrays. Classes without a `head` are embedded by the model as it is now, unless it learns its text tower.

    Raises UserError naming the task for arrays that are missing or do not fit.
    """
    if not inputs:
        raise UserError(f"{wanted.method} learns from images of the tasks; give inputs, one for each task")
    width, tasks = int(model.model_cfg["embed_dim"]), []
    for number, given in enumerate(inputs):
        _require(wanted, given, f"inputs of task number {number + 1}")
        drawn = given.drawn(wanted.examples, wanted.seed)
        head = None if drawn.head is None else torch.from_numpy(drawn.head).float()
        if head is not None and head.shape[1] != width:
            raise UserError(
                f"inputs of task number {number + 1}: head has {head.shape[1]} columns and the model embeds in {width}"
            )
        if wanted.towers == "both":
            head = None
        elif head is None:
            with torch.no_grad():
                head = encode_texts(model, model.tokens(drawn)).float()
        frozen = None if head is None else F.normalize(head, dim=1).to(model.device)
        at = scale if drawn.logit_scale is None else drawn.logit_scale
        task = Task(number, drawn, frozen, at)
        labels = drawn.labels
        if wanted.row.loss == "labels" and not 0 <= int(labels.min()) <= int(labels.max()) < task.classes:
            raise UserError(
                f"inputs of task number {number + 1}: labels are not all among its {task.classes} classes"
            )
        tasks.append(task)
    return tasks


def _require(wanted: Wanted, given: Inputs, which: str) -> None:
    needed = ["images"] + (["labels"] if wanted.row.loss == "labels" else [])
    needed += ["tokens"] if wanted.towers == "both" or given.head is None else []
    for name in needed:
        value = getattr(given, name)
        if value is None or not len(value):
            other = " or ['head']" if name == "tokens" and wanted.towers == "image" else ""
            raise UserError(f"{which}: {wanted.method} needs ['{name}']{other} that is not empty")
