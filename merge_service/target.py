"""Where a merged model goes: a file, or a directory that open_clip loads as it is."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_service.checkpoint import CONFIG_FILE, WEIGHTS_FILE, Checkpoint, CheckpointWriter
from merge_service.errors import CheckpointError


@dataclass(frozen=True)
class Target:
    """Where a merged model goes, and the open_clip configuration that goes with it."""

    path: Path
    weights: Path
    config: Path | None

    @classmethod
    def of(cls, out: Path | str, sources: Sequence[Path | str]) -> "Target":
        """A file if the name says so, else a directory with the configuration of the first source that has one."""
        path = Path(out)
        if path.name.endswith(".safetensors"):
            return cls(path, path, None)
        for source in sources:
            if (Path(source) / CONFIG_FILE).is_file():
                return cls(path, path / WEIGHTS_FILE, Path(source) / CONFIG_FILE)
        raise CheckpointError(
            f"cannot tell how to write {path}: name a .safetensors file, or give inputs that are directories with "
            f"{CONFIG_FILE} to get such a directory"
        )

    @contextlib.contextmanager
    def open(self, reference: Checkpoint, metadata: dict[str, str]) -> Iterator[CheckpointWriter]:
        """A writer shaped like `reference`; the configuration is there before the weights are."""
        layout = {name: (info.dtype, info.shape) for name, info in reference.tensors.items()}
        with CheckpointWriter(self.weights, layout, metadata) as writer:
            yield writer
            if self.config is not None and self.config.parent.resolve() != self.path.resolve():
                shutil.copyfile(self.config, self.path / CONFIG_FILE)
