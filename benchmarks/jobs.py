"""Inputs of `train.py` and `evaluate.py`: the mini suite, models, and jobs on them.

Invariant: a job depends on its arguments alone, so that every contender trains on, or scores, the same data.
"""

import json
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from workers.data import mini
from workers.data.manifest import read_suite
from workers.jobs import EngineSpec, Source, TrainJob
from workers.training.recipe import REPLAY, Recipe

TINY = Path(__file__).parents[1] / "configs" / "models" / "tiny-clip"
TASKS = ("letters", "scripts", "photos_b", "icon_style", "emoji_group", "skin_tone")
MODELS = ("tiny", "w128")
TOWER = "ViT-B-16"
"""open_clip's configuration of a tower of the size that people use."""


def suite(root: Path) -> dict[str, list[str]]:
    """The roles of the mini suite in `root`, which is written if it is not there."""
    mini.build(root, processes=2)
    return read_suite(root)["roles"]


def model(name: str, work: Path) -> Path:
    """The weights directory of `tiny` (tiny-clip), or of `w128`: the same with width 128 and random weights."""
    if name == "tiny":
        return TINY
    out = work / "models" / name
    if not (out / "open_clip_config.json").is_file():
        from workers.models.model import export_base

        config: dict[str, Any] = json.loads((TINY / "open_clip_config.json").read_text())
        config["model_cfg"]["embed_dim"] = 128
        config["model_cfg"]["vision_cfg"] |= {"width": 128, "layers": 4, "mlp_ratio": 4.0}
        config["model_cfg"]["text_cfg"] |= {"width": 128, "layers": 4, "heads": 4}
        file = work / "models" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(config))
        export_base(str(file), None, out)
    return out


def towers(work: Path, count: int) -> list[Path]:
    """Weights directories of `count` models of the configuration TOWER, with random weights."""
    made = [work / "models" / f"{TOWER}-{seed}" for seed in range(count)]
    for seed, out in enumerate(made):
        if not (out / "open_clip_config.json").is_file():
            from workers.models.model import export_base

            export_base(TOWER, None, out, seed=seed)
    return made


def excerpt(root: Path, names: Iterable[str], images: int, out: Path) -> Path:
    """A data root in `out` with `images` samples of the test split of each dataset, evenly spread over the split."""
    for name in names:
        (out / name / "test").mkdir(parents=True)
        for file in (root / name).glob("*.txt"):
            shutil.copyfile(file, out / name / file.name)
        (out / name / "test" / "nshards.txt").write_text("1")
        with tarfile.open(root / name / "test" / "0.tar") as whole, tarfile.open(out / name / "test" / "0.tar", "w") as part:  # fmt: skip
            members = whole.getmembers()
            keys = sorted({member.name.partition(".")[0] for member in members})
            kept = {keys[at * len(keys) // images] for at in range(images)}
            for member in members:
                if member.name.partition(".")[0] in kept:
                    part.addfile(member, whole.extractfile(member))
    return out


def expert(
    job: dict[str, Any], steps: int, kind: str = "torch", stage: int = 0, task: str = "scripts"
) -> TrainJob:
    """The third expert of a stream, replaying as TIME does: 21 pretraining, 22 new and 21 earlier images of 64."""

    def train(*names: str) -> tuple[Source, ...]:
        return tuple(Source(job["root"], name, "train") for name in names)

    out = Path(job["out"])
    return TrainJob(
        fingerprint="benchmark", label=task, t=3, task=task, init=job["model"], base=job["model"],
        update=train(task), buffer=train(*(name for name in TASKS[:3] if name != task)), pretraining=train(*job["pool"]),
        recipe=recipe(job).model_dump(), steps=steps, seed=1, engine=EngineSpec(kind, stage, job["threads"]),  # type: ignore[arg-type]
        scratch=str(out / "scratch"), checkpoint_every=0, out=str(out / "weights"), cache=job["cache"],
    )  # fmt: skip


def recipe(job: dict[str, Any]) -> Recipe:
    """That of the demo."""
    return Recipe(lr=3e-4, batch_size=job["batch_size"], precision=job["precision"], mixture=REPLAY)
