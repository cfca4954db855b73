"""Tiny models that answer very differently, and pictures, for the tests of serving."""

import hashlib
import io
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from merge_service.checkpoints import WEIGHTS_FILE
from tests.workers.model_helpers import write_config
from workers.models.model import export_base
from workers.serving.served import Served

LABELS = ("red", "green", "blue", "grey")


@dataclass(frozen=True)
class Zoo:
    """Weights directories of one tiny model with random weights, and what would be served of them."""

    root: Path

    @property
    def home(self) -> Path:
        """Configuration and first weights."""
        return self.root / "model-0"

    def served(self, t: int, seq: int | None = None) -> Served:
        """Weights number `t`, of which there are three."""
        path = self.root / f"model-{t}" / WEIGHTS_FILE
        return Served(t, f"a-{t:06d}", sha256_of(path), path, t + 1 if seq is None else seq)

    def damaged(self, kind: str) -> tuple[Served, str]:
        """Weights that cannot be served, and the code of what is wrong."""
        good, path = self.served(1), self.root / f"{kind}.safetensors"
        data = good.path.read_bytes()
        shapes = self.root / "other" / WEIGHTS_FILE
        body, code = {
            "truncated": (data[: len(data) // 2], "weights.damaged"),
            "shapes": (shapes.read_bytes(), "weights.unfit"),
            "nan": (data[:-4] + np.float32("nan").tobytes(), "weights.not_finite"),
            "pickle": (b"\x80\x02}q\x00.", "weights.damaged"),
            "sha256": (data[:-4] + np.float32(0.5).tobytes(), "weights.sha256"),
            "absent": (data, "weights.missing"),
        }[kind]
        path.write_bytes(body)
        digest = good.sha256 if kind == "sha256" else sha256_of(path)
        if kind == "absent":
            path.unlink()
        return Served(9, "a-000009", digest, path, 99), code


def make_zoo(root: Path) -> Zoo:
    """Three models, and one of another width."""
    config = write_config(root / "config")
    for t in range(3):
        export_base(str(config), None, root / f"model-{t}", seed=t + 1)
    export_base(str(write_config(root / "wider", embed_dim=24)), None, root / "other", seed=1)
    shutil.rmtree(root / "config")
    return Zoo(root)


@cache
def picture(seed: int = 0, size: tuple[int, int] = (40, 52), kind: str = "PNG") -> bytes:
    """A file of a picture with stripes, height and width of `size`."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (5, 6, 3), np.uint8)
    image = Image.fromarray(small).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
