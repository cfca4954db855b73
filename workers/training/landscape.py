"""The loss along an expert's task vector, on its own task and on earlier data, at the start, the middle and the end.

It explains when averaging helps: where the loss on old data curves upward along the task vector, half the way costs less than half
the increase.
Invariant: the result depends on the job and the two weights directories only; nothing is trained, and no training batch is used.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from workers.data.batches import Batches
from workers.feed.device import Host
from workers.feed.pixels import Pixels
from workers.feed.ring import Batch, ready
from workers.jobs import Source, TrainJob
from workers.models.model import load, preprocess_cfg, tokenizer
from workers.training.objective import ContrastiveLoss, TwoTowers

POINTS = (0.0, 0.5, 1.0)
BATCHES = 4


def along(job: TrainJob, expert: Path, old: Sequence[Source]) -> dict[str, list[float]]:
    """{"new": losses, "old": losses} at `POINTS` of the way from `job.init` to `expert`, each the mean over `BATCHES` batches.

    "new" is the data of the job's task, "old" that of the sources `old`, both with the batch size and crops of the job. The batches are
    those of the steps after the job's last one. Raises what `workers.models.model.load` and `Batches` raise.
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
    """4 (start + end - 2 middle) of three losses: for a quadratic loss, the curvature along the whole task vector."""
    start, middle, end = losses
    return 4 * (start + end - 2 * middle)


def _batches(job: TrainJob, sources: Sequence[Source]) -> list[Batch]:
    recipe = {**job.recipe, "mixture": {"pretraining": 0.0, "update": 1.0, "buffer": 0.0}}
    preprocess = preprocess_cfg(Path(job.init))
    batches = Batches(
        replace(job, update=tuple(sources), recipe=recipe), tokenizer(Path(job.init)), preprocess
    )
    pixels = Pixels(preprocess, Host.place)
    return [ready(batches, pixels, job.steps + number) for number in range(BATCHES)]


def _between(start: torch.nn.Module, end: torch.nn.Module, point: float) -> torch.nn.Module:
    """The linear interpolation (1 - point) start + point end; tensors that are not floats are those of `end`."""
    model, states = copy.deepcopy(end), (start.state_dict(), end.state_dict())
    model.load_state_dict({
        name: torch.lerp(states[0][name], tensor, point) if tensor.is_floating_point() else tensor
        for name, tensor in states[1].items()
    })  # fmt: skip
    return model


@torch.inference_mode()
def _loss(model: torch.nn.Module, batches: Sequence[Batch]) -> float:
    loss = ContrastiveLoss(0, 1)
    return sum(float(loss(model(*batch))) for batch in batches) / len(batches)
