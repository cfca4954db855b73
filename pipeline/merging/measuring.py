"""Measures a statistic of one checkpoint on the data of a study's task, from the command line and without a cluster.

Rows come from the task's training split, in the preprocessing of evaluation and without augmentation. Invariant: no test or
validation split is read.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_service.errors import UserError
from merge_service.techniques import nearest
from pipeline.plan.facts import cache_of, ensure_data, gather, local_base
from pipeline.plan.steps import TRAIN
from pipeline.run.evaluation import named_as_given, weights_directory
from pipeline.study.config import Study
from pipeline.study.streams import StreamTask

if TYPE_CHECKING:
    from workers.evidence import Asked, Measured


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
    from workers.evidence import Where, measure
    from workers.evidence.tasks import inputs_of
    from workers.jobs import Source

    ensure_data(what.study)
    study = what.study.resolved()
    task = task_of(study, what.task)
    root, cache = str(Path(study.data_root).absolute()), cache_of(study)
    with tempfile.TemporaryDirectory() as place, named_as_given(Path(place), what.checkpoint):
        directory, _ = weights_directory(what.checkpoint, study, Path(place))
        sources = [Source(root, part.dataset, TRAIN, part.classes) for part in task.parts]
        head = _head(study) if asked.towers == "image" and asked.kind != "gram" else None
        inputs = inputs_of(asked, sources, directory, str(cache), head)
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


def _head(study: Study) -> Path:
    """The base whose class embeddings stand for the text tower."""
    base = local_base(study.model)
    if base is None or not base.is_dir():
        raise UserError(
            "towers: image needs the class embeddings of the study's base, which is not a weights directory here; leave --towers out"
        )
    return base
