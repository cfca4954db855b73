"""What each method minimises, task by task, and what it learns beside the coefficients: heads, or triggers against backdoors.

Invariant: a loss at a step depends on the model, the step and the objective's own values, which are in the checkpoint.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from workers.evidence.network import Opened
from workers.learning import losses
from workers.learning.adam import Adam, Tensors
from workers.learning.tasks import Task
from workers.learning.wanted import Wanted

HEAD = "head:"
TRIGGER = "trigger:"


class Objective:
    """The loss of a task's batch, from the predictions of the model; entropy of these.

    `values` are what is learned with the coefficients, at the same rate; `aside` is learned before every step, by `prepare`.
    """

    def __init__(self, wanted: Wanted, tasks: Sequence[Task], model: Opened) -> None:
        self.wanted, self.tasks, self.model = wanted, tasks, model
        self.values: Tensors = {}
        self.aside: Tensors = {}
        self.adam: Adam | None = None

    def turns(self, step: int) -> list[list[int]]:
        """The tasks of a step, by their numbers, in parts after each of which values move."""
        return [list(range(len(self.tasks)))]

    def prepare(self, step: int) -> None:
        """What happens with the filled model before the gradients of a step."""

    def weight(self, task: Task) -> float:
        """The weight of a task's loss."""
        return 1 / math.log(max(task.classes, 2)) if self.wanted.weigh == "classes" else 1.0

    def loss(self, task: Task, step: int) -> torch.Tensor | None:
        """The loss of a task at a step; None where no image counts."""
        rows = task.rows(self.wanted, step)
        return self.weight(task) * self.of(task, rows, task.images(self.model, rows))

    def of(self, task: Task, rows: np.ndarray, images: torch.Tensor) -> torch.Tensor:
        """The loss of images."""
        return losses.entropy(task.log_p(self.model, images))

    def extra(self, values: Mapping[str, torch.Tensor]) -> tuple[float, Tensors]:
        """A loss of the coefficients alone, with its gradient."""
        return 0.0, {}


class Labelled(Objective):
    """Cross-entropy at the labels."""

    def of(self, task: Task, rows: np.ndarray, images: torch.Tensor) -> torch.Tensor:
        return losses.cross_entropy(task.log_p(self.model, images), task.labels(rows).to(images.device))


class Taught(Objective):
    """Divergence from each expert on the images of its task, and the similarity of the experts' coefficients."""

    def __init__(
        self, wanted: Wanted, tasks: Sequence[Task], model: Opened, experts: Sequence[torch.Tensor]
    ) -> None:
        super().__init__(wanted, tasks, model)
        self.experts = experts

    def of(self, task: Task, rows: np.ndarray, images: torch.Tensor) -> torch.Tensor:
        own = self.experts[task.number][rows].to(images.device)
        return losses.divergence(task.log_p(self.model, images), own, self.wanted.temperature)

    def extra(self, values: Mapping[str, torch.Tensor]) -> tuple[float, Tensors]:
        leaves = {name: one.detach().clone().requires_grad_() for name, one in values.items()}
        loss = self.wanted.similarity * losses.similarity(leaves.values())
        if not loss.requires_grad:
            return 0.0, {}
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return float(loss.detach()), {name: one for name, one in zip(leaves, found) if one is not None}


class Tinted(Objective):
    """Cross-entropy to an expert's predictions through a head of the task, where expert and model agree or the expert is surer."""

    def __init__(
        self, wanted: Wanted, tasks: Sequence[Task], model: Opened, experts: Sequence[torch.Tensor]
    ) -> None:
        super().__init__(wanted, tasks, model)
        self.experts = experts
        for task in tasks:
            assert task.head is not None
            self.values[f"{HEAD}{task.number}"] = task.head.clone()

    def turns(self, step: int) -> list[list[int]]:
        order = np.random.default_rng([self.wanted.seed, step]).permutation(len(self.tasks))
        return [[int(number)] for number in order]

    def loss(self, task: Task, step: int) -> torch.Tensor | None:
        rows = task.rows(self.wanted, step)
        head = self.values[f"{HEAD}{task.number}"].requires_grad_()
        log_p = task.log_p(self.model, task.images(self.model, rows), head)
        return losses.tinted(log_p, self.experts[task.number][rows].to(log_p.device))


class Triggered(Objective):
    """Entropy of images, clean and with a trigger; the trigger of a task moves first, away from the clean prediction.

    Images are the model's inputs, normalised, and are not clamped.
    """

    def __init__(self, wanted: Wanted, tasks: Sequence[Task], model: Opened) -> None:
        super().__init__(wanted, tasks, model)
        for task in tasks:
            shape = task.images(model, np.arange(1)).shape[1:]
            self.aside[f"{TRIGGER}{task.number}"] = torch.zeros(shape, device=model.device)
        self.adam = Adam(self.aside, wanted.trigger_rate)

    def prepare(self, step: int) -> None:
        assert self.adam is not None
        gradients = {}
        for task in self.tasks:
            images = task.images(self.model, task.rows(self.wanted, step))
            name = f"{TRIGGER}{task.number}"
            gradients[name] = self.attack(task, images, self.aside[name])[1]
        self.adam.step(self.aside, gradients)

    def attack(self, task: Task, images: torch.Tensor, trigger: torch.Tensor) -> tuple[float, torch.Tensor]:
        """The loss of a trigger [3, H, W], which is low where it changes the clean predictions, and its gradient."""
        with torch.no_grad():
            clean = task.log_p(self.model, images).argmax(1)
        leaf = trigger.detach().clone().requires_grad_()
        loss = -losses.cross_entropy(task.log_p(self.model, images + leaf), clean)
        return float(loss.detach()), torch.autograd.grad(loss, leaf)[0]

    def of(self, task: Task, rows: np.ndarray, images: torch.Tensor) -> torch.Tensor:
        defence = losses.entropy(task.log_p(self.model, images + self.aside[f"{TRIGGER}{task.number}"]))
        return losses.entropy(task.log_p(self.model, images)) + self.wanted.adversarial_weight * defence


def needs_experts(wanted: Wanted) -> bool:
    """Whether the experts' own predictions are used."""
    return wanted.row.loss in ("experts", "heads")


def objective_of(
    wanted: Wanted, tasks: Sequence[Task], model: Opened, experts: Sequence[torch.Tensor]
) -> Objective:
    """The objective of a method."""
    kind = wanted.row.loss
    if kind == "experts":
        return Taught(wanted, tasks, model, experts)
    if kind == "heads":
        return Tinted(wanted, tasks, model, experts)
    if kind == "triggers":
        return Triggered(wanted, tasks, model)
    return (Labelled if kind == "labels" else Objective)(wanted, tasks, model)
