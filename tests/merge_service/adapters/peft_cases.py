"""The cases that peft wrote (`peft_reference.py`), as files: a base, and an adapter with what peft makes of both."""

import json
from pathlib import Path

import numpy as np

from merge_service.checkpoints import Checkpoint
from tests.merge_service.toys import save

GOLDEN = Path(__file__).parents[2] / "golden" / "peft.safetensors"


def names() -> list[str]:
    with Checkpoint.open(GOLDEN) as held:
        return list(json.loads(held.metadata["configs"]))


def arrays(prefix: str) -> dict[str, np.ndarray]:
    """The tensors under a prefix."""
    with Checkpoint.open(GOLDEN) as held:
        return {
            name.removeprefix(prefix): held.read(name).reshape(info.shape).copy()
            for name, info in held.tensors.items()
            if name.startswith(prefix)
        }


def config(case: str) -> dict:
    with Checkpoint.open(GOLDEN) as held:
        return json.loads(json.loads(held.metadata["configs"])[case])


def base(room: Path, dtypes: dict[str, str] | None = None) -> Path:
    return save(room / "base.safetensors", arrays("base/"), dtypes=dtypes)


def adapter(room: Path, case: str, name: str | None = None, **changes) -> Path:
    """The folder that peft wrote, with `changes` of its configuration."""
    folder = room / (name or case)
    folder.mkdir()
    save(folder / "adapter_model.safetensors", arrays(f"{case}/adapter/"))
    (folder / "adapter_config.json").write_text(json.dumps({**config(case), **changes}))
    return folder


def merged(case: str) -> dict[str, np.ndarray]:
    """peft's merged weights."""
    return {**arrays("base/"), **arrays(f"{case}/merged/")}
