"""Jobs and results of workers: values that travel between processes.

A job holds plain strings, numbers and tuples only, so it pickles small, prints readably and needs no torch. Paths are strings because a
job may be sent to another machine.
Invariant: everything that affects a result is in the job; the place where it runs is not, except for the directories it may write to.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict

Reading = Literal["decoded", "encoded", "auto"]
COEFFICIENTS_FILE = "coefficients.safetensors"
"""The file of a learning."""


@dataclass(frozen=True)
class Source:
    """One split of one dataset under `root`, optionally only the samples of some of its classes.

    `reading`: pictures are decoded once into the cache (decoded) or at every access (encoded); auto decides by the number of samples.
    `addresses` are those from which shards may be read.
    """

    root: str
    dataset: str
    split: str
    classes: tuple[str, ...] | None = None
    reading: Reading = "decoded"
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineSpec:
    """The numerics of training that are not in the recipe; they are part of an expert's fingerprint."""

    kind: Literal["torch", "deepspeed"] = "torch"
    zero_stage: int = 0
    threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    world: int = 1


@dataclass(frozen=True)
class TrainJob:
    """Train the expert of task `task` (time step `t`) from the weights in `init` and write it to `out`.

    `init` and `base` are weight directories; the result is checked against `base`, and the task vector is its difference from
    `base`. `recipe` is `Recipe.model_dump()`. `buffer` and `pretraining` may be empty. `scratch` outlives a crash
    (checkpoints, progress.json); `out` is a staging directory of the store. `checkpoint_every` is in steps, 0: never. With
    `checkpoint_seconds` > 0 the interval is that many seconds instead. `loaders` are threads that read pictures for a GPU.
    With `activation_checkpointing` activations are computed again in the backward pass: less memory, the same bits.
    `asked_limits` are the (technique, params) whose thresholds later merges need of the expert; they are stored in the directory
    `limits` and affect no result.
    """

    fingerprint: str
    label: str
    t: int
    task: str
    init: str
    base: str
    update: tuple[Source, ...]
    buffer: tuple[Source, ...]
    pretraining: tuple[Source, ...]
    recipe: Mapping[str, Any]
    steps: int
    seed: int
    engine: EngineSpec
    scratch: str
    checkpoint_every: int
    out: str
    cache: str
    asked_limits: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    limits: str = ""
    checkpoint_seconds: float = 0.0
    loaders: int = 1
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class EvaluateJob:
    """Score the weights in `model` on every dataset (`Source.split` is the test split).

    `fraction` < 1 scores a class-balanced subset drawn with `seed` (at least two samples per class). `details` are the details to
    compute besides scores (`scoring.details.DETAILS`). The towers compute in `precision` (autocast); features are compared in fp32.
    """

    fingerprint: str
    label: str
    model: str
    datasets: tuple[Source, ...]
    fraction: float = 1.0
    seed: int = 0
    batch_size: int = 256
    threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    scratch: str = ""
    cache: str = ""
    loaders: int = 1
    details: tuple[str, ...] = ()
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"


@dataclass(frozen=True)
class MeasureJob:
    """Measure a statistic of every one of `models` (weights directories) on rows of its own `data`, into 1.safetensors, 2.safetensors, ...

    `params` are those of `evidence.Asked` beside device; `merging` are the parameters of the merge, for kinds that depend on it. `head`
    is a weights directory whose class embeddings stand for the text tower, "" where the model has its own. Sources name training splits.
    """

    fingerprint: str
    label: str
    statistic: str
    models: tuple[str, ...]
    data: tuple[tuple[Source, ...], ...]
    params: Mapping[str, Any]
    merging: Mapping[str, Any] = field(default_factory=dict)
    head: str = ""
    threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    scratch: str = ""
    cache: str = ""
    out: str = ""


@dataclass(frozen=True)
class LearnJob:
    """Learn the coefficients with which `models` (weights directories, oldest first) are merged on `base`, into coefficients.safetensors.

    `params` are those of `learning.Wanted` beside device. `data` are the training splits of each task. `before` is a file of coefficients
    from which models that it knows begin, "" for none. `scratch` outlives a crash: learning goes on from there.
    """

    fingerprint: str
    label: str
    method: str
    params: Mapping[str, Any]
    base: str
    models: tuple[str, ...]
    data: tuple[tuple[Source, ...], ...]
    scratch: str
    before: str = ""
    threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    cache: str = ""
    out: str = ""


class TrainResult(TypedDict):
    """A record of a training, as every rank returns it.

    `loss` is [[step, mean loss since the last point], ...], at most 200 points. `lr` and `grad_norm` (before clipping) are [first,
    highest, last]. `task_vector_norm` is the L2 norm of expert - base over float tensors in fp64, `drift` that of expert - initial
    weights, and `relative_drift` is `drift` divided by the norm of the initial weights; all three are None on ranks other than 0.
    `resumed_from` is a step or None. `system` are samples of machine usage by name (`workers.training.usage`).
    """

    steps: int
    samples: int
    seconds: float
    samples_per_second: float
    loss: list[list[float]]
    lr: list[float]
    grad_norm: list[float]
    task_vector_norm: float | None
    drift: float | None
    relative_drift: float | None
    resumed_from: int | None
    system: NotRequired[dict[str, list[float]]]


class EvaluateResult(TypedDict):
    """Scores in [0, 1] and the number of samples behind each, by dataset; `details` if some were requested (`scoring.details`)."""

    scores: dict[str, float]
    samples: dict[str, int]
    seconds: float
    details: NotRequired[dict[str, dict[str, object]]]


class MeasureResult(TypedDict):
    """A measurement: the rows of data drawn for every model, the tensors and bytes of all files, and the seconds."""

    examples: list[int]
    tensors: int
    bytes: int
    seconds: float


class LearnResult(TypedDict):
    """A learning: images of all tasks together, steps, the first and the last loss (none without steps), bytes, and the seconds."""

    examples: int
    steps: int
    loss: list[float]
    bytes: int
    seconds: float
