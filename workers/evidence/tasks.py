"""Measures models on rows of tasks' data: training splits in the preprocessing of evaluation, without augmentation.

Invariant: which rows are drawn depends on the number of samples, `examples` and `seed` alone. A measurement reads training splits only.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch

from merge_service.checkpoints import WEIGHTS_FILE, Checkpoint
from merge_service.errors import UserError
from workers.data.decode import Samples, load
from workers.evidence.asked import Asked, Inputs, chosen
from workers.evidence.layerwise import KIND as LAYERWISE
from workers.evidence.layerwise import Experts, measure_layerwise
from workers.evidence.measure import Where, measure
from workers.evidence.network import temperature_of
from workers.jobs import MeasureJob, MeasureResult, Source
from workers.models.model import preprocess_cfg, tokenizer
from workers.scoring.evaluate import heads_of

TRAIN = "train"


def measure_models(job: MeasureJob) -> MeasureResult:
    """Carry out a job. Raises UserError for data that the kind cannot use, and what `measure` raises."""
    started, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(job.threads)
    try:
        files, examples = _together(job) if job.statistic == LAYERWISE else _one_by_one(job)
    finally:
        torch.set_num_threads(threads)
    return {
        "examples": examples,
        "tensors": sum(map(_tensors, files)),
        "bytes": sum(file.stat().st_size for file in files),
        "seconds": time.perf_counter() - started,
    }


def inputs_of(
    asked: Asked,
    sources: Sequence[Source],
    model: Path,
    cache: str,
    head: Path | None = None,
    split: str = TRAIN,
) -> Inputs:
    """Drawn pictures of a task with their texts (gram), or with classes and labels; `model` says how pictures and texts are read.

    `head`: the base whose class embeddings and temperature stand for the text tower. `split` is the one that may be read. Raises
    UserError.
    """
    wrong = [source for source in sources if source.split != split]
    if wrong:
        raise UserError(f"{wrong[0].dataset}: images are those of the {split} split, not of {wrong[0].split}")
    look = preprocess_cfg(model)
    parts = [load(source, look["size"], cache, look) for source in sources]
    sizes = [len(part) for part in parts]
    if not sum(sizes):
        raise UserError(f"{', '.join(source.dataset for source in sources)}: no sample to measure on")
    rows = np.arange(sum(sizes))[chosen(sum(sizes), asked.most, asked.seed)]
    starts = np.cumsum([0, *sizes])
    drawn = [rows[(rows >= start) & (rows < stop)] - start for start, stop in itertools.pairwise(starts)]
    images = np.concatenate([np.asarray(part.images[some]) for part, some in zip(parts, drawn) if len(some)])
    if asked.kind == "gram":
        texts = [part.texts(int(row))[0] for part, some in zip(parts, drawn) for row in some]
        return Inputs(images, tokenizer(model)(texts).numpy())
    return _of_classes(parts, drawn, images, model, head)


def _of_classes(
    parts: Sequence[Samples], drawn: Sequence[np.ndarray], images: np.ndarray, model: Path, head: Path | None
) -> Inputs:
    """Pictures with labels and a prompt for each class of the task, or the frozen embeddings of these."""
    captions = [part.name for part in parts if part.kind != "classification"]
    if captions:
        raise UserError(
            f"gradients are of class scores, and {captions[0]} has captions and no classes; measure gram, or another task"
        )
    kept = [np.unique(part.labels) for part in parts]
    before = np.cumsum([0, *(len(one) for one in kept)])
    every = zip(parts, drawn, kept, before)
    labels = np.concatenate([np.searchsorted(own, part.labels[some]) + at for part, some, own, at in every])
    if head is not None:
        named = [([part.classes[label] for label in own], part.templates) for part, own in zip(parts, kept)]
        embedded = np.concatenate(heads_of(head, named))
        return Inputs(images, None, labels, embedded, temperature_of(head / WEIGHTS_FILE))
    prompts = [
        part.templates[0].replace("{c}", part.classes[label])
        for part, own in zip(parts, kept)
        for label in own
    ]
    return Inputs(images, tokenizer(model)(prompts).numpy(), labels)


def _one_by_one(job: MeasureJob) -> tuple[list[Path], list[int]]:
    asked = _asked(job, job.statistic)
    head = Path(job.head) if job.head else None
    files, examples = [], []
    for number, (model, sources) in enumerate(zip(job.models, job.data), start=1):
        files.append(Path(job.out) / f"{number}.safetensors")
        inputs = inputs_of(asked, sources, Path(model), job.cache, head)
        found = measure(asked, Where(Path(model), None, files[-1]), inputs)
        examples.append(found.about.examples)
    return files, examples


def _together(job: MeasureJob) -> tuple[list[Path], list[int]]:
    asked, models = _asked(job, "gram"), [Path(model) for model in job.models]
    inputs = [inputs_of(asked, sources, model, job.cache) for model, sources in zip(models, job.data)]
    made = measure_layerwise(Experts(models, inputs, job.merging), asked, Path(job.out))
    files = [
        file.rename(Path(job.out) / f"{number}.safetensors") for number, file in enumerate(made, start=1)
    ]
    return files, [len(one.images) for one in inputs]


def _asked(job: MeasureJob, kind: str) -> Asked:
    known = {one.name for one in fields(Asked)}
    return replace(
        Asked(kind, **{key: value for key, value in job.params.items() if key in known}), device=job.device
    )


def _tensors(file: Path) -> int:
    with Checkpoint.open(file) as found:
        return len(found.tensors)
