"""What a worker is asked to do: frozen values that travel between processes.

A job holds plain strings, numbers and tuples only, so that it pickles small, prints readably and needs no torch to be
made. Paths are strings because a job may cross to a machine with another idea of a path. What bears on the result is
in the job; where it runs is not, apart from the directories it may write to.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Source:
    """One split of one dataset under `root`, optionally only the samples of some of its classes."""

    root: str
    dataset: str
    split: str
    classes: tuple[str, ...] | None = None


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
    """Train the expert of task `task` (time step `t`) from the weights in `init` and leave it in `out`.

    `init` and `base` are weight directories; `base` is what the result is checked against and what the task vector is
    measured from. `recipe` is `Recipe.model_dump()`. `buffer` and `pretraining` may be empty. `scratch` outlives a crash
    (checkpoints, progress.json); `out` is a staging directory of the store. `checkpoint_every` is in steps, 0: never.
    `asked_limits` are the (technique, params) whose thresholds will be asked of the expert; they are kept in the directory
    `limits` and bear on no result.
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


@dataclass(frozen=True)
class EvaluateJob:
    """Score the weights in `model` on every dataset (`Source.split` is the test split).

    `fraction` < 1 scores a class-balanced subset drawn with `seed` (at least two samples per class).
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
