"""Learns the coefficients of a merge on the data of a study's tasks, from the command line and without a cluster.

Images come from the tasks' training splits, in the preprocessing of evaluation and without augmentation. Classes are embedded by the
text tower that the merge has, with all prompts. Invariant: a test split is read only where this is asked for, and the file says so.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_service.errors import UserError
from merge_service.merge import merge
from merge_service.merging import Rules
from pipeline.merging.measuring import task_of
from pipeline.plan.facts import cache_of, ensure_data
from pipeline.plan.steps import TEST, TRAIN
from pipeline.run.evaluation import named_as_given, weights_directory
from pipeline.study.config import Study

if TYPE_CHECKING:
    from workers.learning import Learned, Wanted


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
    from workers.evidence import Asked
    from workers.evidence.tasks import inputs_of
    from workers.jobs import Source
    from workers.learning import Where, learn

    ensure_data(what.study)
    study = what.study.resolved()
    tasks = [task_of(study, name) for name in what.tasks]
    root, cache = str(Path(study.data_root).absolute()), cache_of(study)
    split = TEST if wanted.adapted_on == "test" else TRAIN
    asked = Asked("fisher", wanted.examples, wanted.seed, towers=wanted.towers)
    with (
        tempfile.TemporaryDirectory(prefix="temporal-merge-") as place,
        named_as_given(Path(place), what.base),
    ):
        room = Path(place)
        (room / "base").mkdir()
        directory, _ = weights_directory(what.base, study, room / "base")
        head = _start(wanted, what, directory, room / "start") if wanted.towers == "image" else None
        inputs = []
        for task in tasks:
            sources = [Source(root, part.dataset, split, part.classes) for part in task.parts]
            found = inputs_of(asked, sources, directory, str(cache), head, split)
            inputs.append(replace(found, logit_scale=None))
        where = Where(what.experts, what.base, what.out, str(directory), what.warm_start)
        return learn(wanted, where, inputs)


def _start(wanted: "Wanted", what: OfTasks, directory: Path, out: Path) -> Path:
    """The merge that learning begins with, as a weights directory: its text tower is that of the result."""
    from workers.learning.learn import settled

    starts = settled(wanted, len(what.tasks)).starts(len(what.experts))
    out.mkdir()
    for file in directory.iterdir():
        if file.is_file() and not file.name.endswith(".safetensors"):
            (out / file.name).symlink_to(file.absolute())
    params = {"weights": starts, "scale": 1.0, "logit_scale": "base"}
    ids = [f"e{number}" for number in range(len(starts))]
    target = out / "open_clip_model.safetensors"
    merge(
        "task_arithmetic",
        params,
        what.base,
        what.experts,
        target,
        ids=ids,
        rules=Rules(any_base=True),
        measure=False,
    )
    return out


def listed(tasks: str) -> list[str]:
    """Names of tasks in one text. Raises UserError where there is none."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks names no task; write --tasks animals,flowers")
    return names
