"""Measures a statistic of one checkpoint on the data of a study's task, from the command line and without a cluster.

Rows come from the task's training split, in the preprocessing of evaluation and without augmentation. Invariant: no test or
validation split is read.
"""

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from merge_service.errors import UserError
from merge_service.techniques import nearest
from pipeline.plan.facts import cache_of, ensure_data, gather, local_base
from pipeline.plan.steps import TRAIN
from pipeline.run.evaluation import named_as_given, weights_directory
from pipeline.study.config import Study
from pipeline.study.streams import StreamTask

if TYPE_CHECKING:
    from workers.data.decode import Samples
    from workers.evidence import Asked, Inputs, Measured


@dataclass(frozen=True)
class OfTask:
    """What is measured: a checkpoint, on a task of a study, into a file."""

    checkpoint: Path
    study: Study
    task: str
    out: Path


def measure_task(asked: "Asked", what: OfTask) -> "Measured":
    """Measure and write the file. Raises UserError for a task that the study does not have, data that the kind cannot use, or a
    checkpoint that is none of the study's model.
    """
    from workers.data.decode import load
    from workers.evidence import Where, measure
    from workers.jobs import Source
    from workers.models.model import preprocess_cfg

    ensure_data(what.study)
    study = what.study.resolved()
    task = task_of(study, what.task)
    root, cache = str(Path(study.data_root).absolute()), cache_of(study)
    with tempfile.TemporaryDirectory() as place, named_as_given(Path(place), what.checkpoint):
        directory, _ = weights_directory(what.checkpoint, study, Path(place))
        look = preprocess_cfg(directory)
        parts = [
            load(Source(root, part.dataset, TRAIN, part.classes), look["size"], str(cache), look)
            for part in task.parts
        ]
        base = local_base(study.model)
        inputs = inputs_of(asked, parts, directory, base if asked.towers == "image" else None)
        file = what.checkpoint if what.checkpoint.is_file() else directory
        where = Where(file, None, what.out, None if file is directory else str(directory))
        return measure(replace(asked, examples=asked.most), where, inputs)


def task_of(study: Study, name: str) -> StreamTask:
    """The task of this name in the study's streams."""
    tasks = [task for stream in gather(study).streams.values() for task in stream.tasks]
    for task in tasks:
        if task.name == name:
            return task
    names = list(dict.fromkeys(task.name for task in tasks))
    raise UserError(f"task {name!r}{nearest(name, names)}: the study's tasks are {', '.join(names)}")


def inputs_of(asked: "Asked", parts: Sequence["Samples"], directory: Path, base: Path | None) -> "Inputs":
    """Drawn pictures of a task with their texts (gram), or with classes and labels."""
    from workers.evidence.asked import Inputs, chosen
    from workers.models.model import tokenizer

    sizes = [len(part) for part in parts]
    rows = np.arange(sum(sizes))[chosen(sum(sizes), asked.most, asked.seed)]
    starts = np.cumsum([0, *sizes])
    drawn = [rows[(rows >= start) & (rows < stop)] - start for start, stop in itertools.pairwise(starts)]
    images = np.concatenate([np.asarray(part.images[some]) for part, some in zip(parts, drawn)])
    tokens = tokenizer(directory)
    if asked.kind == "gram":
        texts = [part.texts(int(row))[0] for part, some in zip(parts, drawn) for row in some]
        return Inputs(images, tokens(texts).numpy())
    captions = [part.name for part in parts if part.kind != "classification"]
    if captions:
        raise UserError(
            f"{asked.kind} takes gradients of class scores, and {captions[0]} has captions and no classes; measure gram, or another task"
        )
    kept = [np.unique(part.labels) for part in parts]
    before = np.cumsum([0, *(len(one) for one in kept)])
    labels = np.concatenate(
        [
            np.searchsorted(own, part.labels[some]) + at
            for part, some, own, at in zip(parts, drawn, kept, before)
        ]
    )
    if asked.towers == "image":
        return replace(_frozen(parts, kept, base), images=images, labels=labels)
    prompts = [
        part.templates[0].replace("{c}", part.classes[label])
        for part, own in zip(parts, kept)
        for label in own
    ]
    return Inputs(images, tokens(prompts).numpy(), labels)


def _frozen(parts: Sequence["Samples"], kept: Sequence[np.ndarray], base: Path | None) -> "Inputs":
    """Class embeddings and temperature of the study's base."""
    from merge_service.checkpoints import WEIGHTS_FILE
    from workers.evidence.asked import Inputs
    from workers.evidence.network import temperature_of
    from workers.scoring.evaluate import heads_of

    if base is None or not base.is_dir():
        raise UserError(
            "towers: image needs the class embeddings of the study's base, which is not a weights directory here; leave --towers out"
        )
    named = [([part.classes[label] for label in own], part.templates) for part, own in zip(parts, kept)]
    return Inputs(head=np.concatenate(heads_of(base, named)), logit_scale=temperature_of(base / WEIGHTS_FILE))
