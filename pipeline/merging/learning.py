"""Learns the coefficients of a merge on the data of a study's tasks, from the command line and without a cluster.

Invariant: a test split is read only where this is asked for, and the file says so.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from merge_service.errors import UserError
from pipeline.merging.measuring import task_of
from pipeline.plan.facts import cache_of, ensure_data
from pipeline.plan.steps import TEST, TRAIN
from pipeline.run.evaluation import named_as_given, weights_directory
from pipeline.study.config import Study

if TYPE_CHECKING:
    from workers.learning.learn import Learned
    from workers.learning.wanted import Wanted


@dataclass(frozen=True)
class OfTasks:
    """What is learned: a merge of experts on a base, from tasks of a study, into a file."""

    experts: Sequence[Path]
    base: Path
    study: Study
    tasks: Sequence[str]
    out: Path
    warm_start: Path | None = None


def learn_tasks(wanted: "Wanted", what: OfTasks) -> "Learned":
    """Learn and write the file. Raises UserError for a task that the study does not have, data without classes, or checkpoints that
    are none of the study's model.
    """
    from workers.jobs import Source
    from workers.learning.learn import Where
    from workers.learning.sources import learn_sources

    ensure_data(what.study)
    study = what.study.resolved()
    tasks = [task_of(study, name) for name in what.tasks]
    root, split = str(Path(study.data_root).absolute()), TEST if wanted.adapted_on == "test" else TRAIN
    data = [[Source(root, part.dataset, split, part.classes) for part in task.parts] for task in tasks]
    with (
        tempfile.TemporaryDirectory(prefix="temporal-merge-") as place,
        named_as_given(Path(place), what.base),
    ):
        (Path(place) / "base").mkdir()
        directory, _ = weights_directory(what.base, study, Path(place) / "base")
        where = Where(what.experts, what.base, what.out, str(directory), what.warm_start)
        return learn_sources(wanted, where, data, str(cache_of(study)), split)


def listed(tasks: str) -> list[str]:
    """Names of tasks in one text. Raises UserError where there is none."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks names no task; write --tasks animals,flowers")
    return names
