"""The loss along an expert's task vector: on its own task and on what came before, at the start, the middle and the end.

It exists to say why averaging helps or does not: where the loss on old data bends upward along the task vector, half the way costs less
than half the loss. Invariant: a function of the job and two weights directories alone; nothing is trained, and training drew other batches.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from workers.data.batches import Batches
from workers.jobs import Source, TrainJob
from workers.models.model import load, preprocess_cfg, tokenizer
from workers.training.objective import ContrastiveLoss, TwoTowers

POINTS = (0.0, 0.5, 1.0)
BATCHES = 4


def along(job: TrainJob, expert: Path, old: Sequence[Source]) -> dict[str, list[float]]:
    """{"new": losses, "old": losses} at `POINTS` of the way from `job.init` to `expert`, each the mean of `BATCHES` batches.

    "new" is the task of the job, "old" the data of `old`, with the job's batch size and crops; the batches follow those that the job trains on. Raises what
    `workers.models.model.load` and `Batches` raise.
    """
    start, end = load(Path(job.init)), load(expert)
    batches = {"new": _batches(job, job.update), "old": _batches(job, old)}
    losses: dict[str, list[float]] = {name: [] for name in batches}
    for point in POINTS:
        between = TwoTowers(_between(start, end, point), "fp32")
        for name, some in batches.items():
            losses[name].append(_loss(between, some))
    return losses


def second_difference(losses: Sequence[float]) -> float:
    """What the ends of the way lie above its middle, four times: for a quadratic loss the curvature along the whole vector."""
    start, middle, end = losses
    return 4 * (start + end - 2 * middle)


def _batches(job: TrainJob, sources: Sequence[Source]) -> list[Any]:
    recipe = {**job.recipe, "mixture": {"pretraining": 0.0, "update": 1.0, "buffer": 0.0}}
    init = Path(job.init)
    made = Batches(replace(job, update=tuple(sources), recipe=recipe), tokenizer(init), preprocess_cfg(init))
    return [made.batch(job.steps + number) for number in range(BATCHES)]


def _between(start: torch.nn.Module, end: torch.nn.Module, point: float) -> torch.nn.Module:
    """A model `point` of the way from one to the other; what is no float is that of the end."""
    model, states = copy.deepcopy(end), (start.state_dict(), end.state_dict())
    model.load_state_dict({
        name: torch.lerp(states[0][name], tensor, point) if tensor.is_floating_point() else tensor
        for name, tensor in states[1].items()
    })  # fmt: skip
    return model


@torch.inference_mode()
def _loss(model: torch.nn.Module, batches: Sequence[Any]) -> float:
    loss = ContrastiveLoss(0, 1)
    return sum(float(loss(model(images, tokens))) for images, tokens in batches) / len(batches)
