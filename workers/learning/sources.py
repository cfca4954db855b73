"""Learns the coefficients of a merge on data of tasks: images in the preprocessing of evaluation, without augmentation.

Classes are embedded by the text tower that the merge begins with, with all prompts. Invariant: a step of a study reads training splits
alone, and one that was interrupted goes on in its scratch, to the bit.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.merge import merge
from merge_service.merging import Rules
from merge_service.statistics import COEFFICIENTS, About, write
from merge_service.techniques import get
from workers.evidence.asked import Asked
from workers.evidence.tasks import TRAIN, inputs_of
from workers.jobs import COEFFICIENTS_FILE, LearnJob, LearnResult, Source
from workers.learning.learn import Learned, Where, learn, settled
from workers.learning.wanted import Wanted
from workers.training.checkpoints import Progress


def learn_merge(job: LearnJob) -> LearnResult:
    """Carry out a job. Raises what `learn_sources` raises."""
    started, threads = time.perf_counter(), torch.get_num_threads()
    wanted = Wanted.of(job.method, {**job.params, "device": job.device})
    scratch, base = Path(job.scratch), Path(job.base)
    scratch.mkdir(parents=True, exist_ok=True)
    progress, samples = Progress(scratch, wanted.steps), wanted.batch_size * len(job.data)
    where = Where(
        [Path(model) / WEIGHTS_FILE for model in job.models],
        base / WEIGHTS_FILE,
        Path(job.out) / COEFFICIENTS_FILE,
        str(base),
        Path(job.before) if job.before else None,
        kept=scratch / "learning.safetensors",
        tell=lambda step, loss: progress.tell(step, step * samples, loss),
    )
    torch.set_num_threads(job.threads)
    try:
        found = learn_sources(wanted, where, job.data, job.cache)
    finally:
        torch.set_num_threads(threads)
    return {
        "examples": found.about.examples,
        "steps": len(found.losses),
        "loss": [found.losses[0], found.losses[-1]] if found.losses else [],
        "bytes": (Path(job.out) / COEFFICIENTS_FILE).stat().st_size,
        "seconds": time.perf_counter() - started,
    }


def learn_sources(
    wanted: Wanted, where: Where, data: Sequence[Sequence[Source]], cache: str, split: str = TRAIN
) -> Learned:
    """Learn from the samples of every task, of the `split` that may be read, and write the file.

    `where.config` is the weights directory that says how pictures and texts are read. Raises UserError for data without classes, and
    what `learn` raises.
    """
    directory = Path(where.config or where.base.parent)
    asked = Asked("fisher", wanted.examples, wanted.seed, towers=wanted.towers)
    with tempfile.TemporaryDirectory(prefix="temporal-merge-") as place:
        head = _start(wanted, where, len(data), Path(place)) if wanted.towers == "image" else None
        found = (inputs_of(asked, sources, directory, cache, head, split) for sources in data)
        return learn(wanted, where, [replace(one, logit_scale=None) for one in found])


def _start(wanted: Wanted, where: Where, tasks: int, out: Path) -> Path:
    """The merge with no coefficient learned, as a weights directory: its text tower is that of the result."""
    begun = settled(wanted, tasks)
    for file in Path(where.config or where.base.parent).iterdir():
        if file.is_file() and not file.name.endswith(".safetensors"):
            (out / file.name).symlink_to(file.absolute())
    nothing, said = out / f"nothing.{COEFFICIENTS_FILE}", begun.of_merge()
    write(nothing, {}, About(COEFFICIENTS, {}, 0, parameters=said, technique=wanted.row.technique))
    known = {one.name for one in get(wanted.row.technique).params}
    merge(
        wanted.row.technique, {key: value for key, value in said.items() if key in known}, where.base,
        where.experts, out / WEIGHTS_FILE, ids=[f"e{number}" for number in range(len(where.experts))],
        rules=Rules(any_base=True), measure=False, statistics=[nothing] * len(where.experts),
    )  # fmt: skip
    return out
