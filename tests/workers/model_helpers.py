"""A tiny open_clip model and tiny datasets, for the tests of training and evaluation."""

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from workers.data.writer import Sample, write_dataset
from workers.jobs import EngineSpec, EvaluateJob, Source, TrainJob
from workers.models.model import export_base
from workers.training.recipe import Recipe

MODEL_CFG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PREPROCESS_CFG = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": "bilinear"}
COLOURS = ("red", "green", "blue", "grey", "black")


def write_config(directory: Path, **changes: Any) -> Path:
    """A directory with a configuration and no weights; returns the file."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / CONFIG_FILE
    file.write_text(json.dumps({"model_cfg": MODEL_CFG | changes, "preprocess_cfg": PREPROCESS_CFG}))
    return file


def noisy(classes: int, count: int, seed: int, shape: tuple[int, int] = (32, 32)) -> list[Sample]:
    """Classes that differ by a pattern under noise: learnable in a few steps, but not trivial."""
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 255, (classes, *shape, 3))
    samples = []
    for number in range(count):
        pixels = patterns[number % classes] + rng.normal(0, 50, (*shape, 3))
        samples.append(Sample(np.clip(pixels, 0, 255).astype(np.uint8), number % classes))
    return samples


@dataclass(frozen=True)
class Toys:
    """A base model and datasets `toy`, `old`, `pool` (classification) and `pairs` (retrieval) below one directory."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    def source(self, name: str, split: str = "train") -> Source:
        return Source(str(self.root / "data"), name, split)

    def job(self, out: Path, steps: int = 6, every: int = 0, replay: bool = False, **recipe: Any) -> TrainJob:
        """Train on `toy` into `out/weights`, with scratch beside it."""
        mixture = {"pretraining": 0.33, "update": 0.34, "buffer": 0.33} if replay else {}
        chosen = Recipe(
            **{"lr": 1e-3, "batch_size": 16, "precision": "fp32", "mixture": mixture or {}, **recipe}
        )
        (out / "weights").mkdir(parents=True, exist_ok=True)
        return TrainJob(
            fingerprint=f"job {out.name}", label="toy", t=3, task="toy", init=str(self.base), base=str(self.base),
            update=(self.source("toy"),), buffer=(self.source("old"),) if replay else (),
            pretraining=(self.source("pool"),) if replay else (), recipe=chosen.model_dump(), steps=steps, seed=11,
            engine=EngineSpec(), scratch=str(out / "scratch"), checkpoint_every=every, out=str(out / "weights"),
            cache=str(self.root / "cache"),
        )  # fmt: skip

    def evaluation(self, model: Path, *names: str, **changes: Any) -> EvaluateJob:
        datasets = tuple(self.source(name, "test") for name in names)
        job = EvaluateJob("f", "the toy", str(model), datasets, cache=str(self.root / "cache"))
        return replace(job, **changes)


def make_toys(root: Path) -> Toys:
    export_base(str(write_config(root / "config")), None, root / "base", seed=1)
    for seed, name in enumerate(("toy", "old", "pool")):
        shape = (
            (40, 52) if name == "toy" else (32, 32)
        )  # not square: the resize and crop must matter somewhere
        write_dataset(
            root / "data" / name,
            kind="classification",
            classes=COLOURS,
            templates=["a {c} thing", "something {c}"],
            splits={"train": noisy(5, 80, seed, shape), "test": noisy(5, 60, seed, shape)},
            shard_samples=32,
        )
    pairs = [
        replace(sample, label=None, captions=tuple(f"{COLOURS[k % 5]} number {i}" for k in range(1 + i % 3)))
        for i, sample in enumerate(noisy(30, 30, 9))
    ]
    write_dataset(root / "data" / "pairs", kind="retrieval", classes=(), templates=(), splits={"test": pairs})
    return Toys(root)


def apart(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> float:
    """Distance of two models as a share of the distance of `other` from `start`.

    Not per element: Adam turns the rounding noise of a gradient that is zero in exact arithmetic (a key's bias) into whole steps.
    """

    def norm(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return math.sqrt(sum(float(((a[name].double() - b[name].double()) ** 2).sum()) for name in a))

    return norm(one, other) / norm(other, start)


def sha256(directory: Path | str) -> str:
    return hashlib.sha256((Path(directory) / WEIGHTS_FILE).read_bytes()).hexdigest()
