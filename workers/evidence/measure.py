"""Measures one statistic of one checkpoint on arrays: a pure function of weights, rows, kind and parameters.

Invariant: neither the worker nor how many rows fit at once changes a result beyond rounding.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from merge_service.anatomy import anatomy_of
from merge_service.checkpoints import overwrites
from merge_service.errors import UserError
from merge_service.statistics import About, Numbers, write
from workers.evidence.asked import Asked, Inputs
from workers.evidence.gradients import kfac, means, per_example
from workers.evidence.grams import gram
from workers.evidence.network import Opened, open_model, temperature_of


class Measured(Numbers):
    """A statistic by parameter name."""

    @property
    def rows(self) -> Mapping[str, int]:
        """The number of rows behind each mean."""
        return self.about.rows


@dataclass(frozen=True)
class Where:
    """Files of a measurement: the weights, the base whose temperature goes with a head, the result; `config` names the architecture."""

    checkpoint: Path
    base: Path | None = None
    out: Path | None = None
    config: str | None = None


def measure(asked: Asked, where: Where, inputs: Inputs) -> Measured:
    """Measure, and write the file if one is named.

    Raises UserError for inputs that are missing or do not fit the model, `CheckpointError` for weights that do not, and
    `NonFiniteCheckpoint` where the model gives NaN or infinity.
    """
    for path in (where.checkpoint, *([where.base] if where.base else [])):
        if where.out is not None and overwrites(where.out, path):
            raise UserError(f"--out {where.out} is one of the inputs and would be lost; give another --out")
    if where.base is not None:
        inputs = dataclasses.replace(inputs, logit_scale=temperature_of(where.base))
    towers = _towers(asked, inputs)
    _require(asked, inputs, towers)
    inputs = inputs.drawn(asked.most, asked.seed)
    model = open_model(where.checkpoint, asked, where.config)
    tensors, rows = _found(model, asked, inputs, towers)
    examples = len(inputs.images if inputs.images is not None else inputs.tokens)
    said = {key: value for key, value in dataclasses.asdict(asked).items() if key not in ("kind", "examples")}
    said = {**said, "towers": towers, "device": torch.device(asked.device).type}
    content, sha256 = model.digests
    about = About(asked.kind, rows, examples, sha256, content, said)
    if where.out is not None:
        write(where.out, tensors, about)
    return Measured(tensors, about, where.out)


def _found(
    model: Opened, asked: Asked, inputs: Inputs, towers: str
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    if asked.kind == "gram":
        grams = gram(model, asked, inputs)
        kept = _in_scope(model, asked.scope)
        tensors = {name: one.numpy() for name, one in grams.means().items() if name in kept}
        return tensors, {name: grams.rows[name] for name in tensors}
    _check_classes(model, inputs, towers)
    if asked.kind == "kfac":
        factors = kfac(model, asked, inputs, towers)
        return {name: one.numpy() for name, one in means(factors)}, factors.inner.rows
    elements = per_example(model, asked, inputs, towers)
    tensors = {name: (one / elements.count).cpu().numpy() for name, one in elements.sums.items()}
    return tensors, dict.fromkeys(tensors, elements.count)


def _in_scope(model: Opened, scope: str) -> set[str]:
    """The parameters whose inputs are kept."""
    shapes = {name: tuple(one.shape) for name, one in model.model.named_parameters()}
    anatomy = anatomy_of(shapes)
    return {
        name
        for name, shape in shapes.items()
        if scope == "all" or (anatomy.layer(name) is not None and len(shape) == 2)
    }


def _towers(asked: Asked, inputs: Inputs) -> str:
    """The towers that gradients pass: as asked, else both where there are class prompts (K-FAC: where there is no head)."""
    if asked.towers is not None:
        return asked.towers
    prefers_head = asked.kind == "kfac" and inputs.head is not None
    return "both" if inputs.tokens is not None and not prefers_head else "image"


def _require(asked: Asked, inputs: Inputs, towers: str) -> None:
    """Raise UserError if an array is missing that the kind needs."""
    needed = {"gram": ()}.get(asked.kind, ("images", "head" if towers == "image" else "tokens"))
    if asked.kind == "gradient" or (asked.kind != "gram" and asked.labels == "given"):
        needed = (*needed, "labels")
    lacking = [name for name in needed if getattr(inputs, name) is None]
    given = {name: len(one) for name in ("images", "tokens") if (one := getattr(inputs, name)) is not None}
    if asked.kind == "gram" and not given:
        lacking = ["images"]
    empty = [] if lacking else [name for name, count in given.items() if not count]
    if lacking or empty:
        raise UserError(
            f"{asked.kind} needs inputs[{(lacking or empty)[0]!r}]{' that is not empty' if empty else ''}"
            f"{'' if asked.kind == 'gram' else f' (towers: {towers})'}"
        )


def _check_classes(model: Opened, inputs: Inputs, towers: str) -> None:
    """Raise UserError for a head that does not fit the model, or labels without a class."""
    width = int(model.model_cfg["embed_dim"])
    if towers == "image" and inputs.head.shape[1] != width:
        raise UserError(f"inputs['head'] has {inputs.head.shape[1]} columns and the model embeds in {width}")
    classes = len(inputs.head if towers == "image" else inputs.tokens)
    labels: Any = inputs.labels
    if labels is not None and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UserError(
            f"inputs['labels'] are from {int(labels.min())} to {int(labels.max())}, and there are {classes} classes"
        )
