"""The standard names of weights in a directory, and which of them a kind of directory has.

Invariant: nothing of a directory is imported or executed; a name decides.
"""

import json
from pathlib import Path
from typing import Any

OPEN_CLIP, TRANSFORMERS, DIFFUSERS, ADAPTER = (
    "open_clip_model",
    "model",
    "diffusion_pytorch_model",
    "adapter_model",
)
STANDARD = (OPEN_CLIP, TRANSFORMERS, DIFFUSERS, ADAPTER)
"""Names of weights, without suffix, that libraries look for, in the order in which one is preferred among several."""
CONFIG, OPEN_CLIP_CONFIG, ADAPTER_CONFIG = "config.json", "open_clip_config.json", "adapter_config.json"
ADAPTER_FILES = (ADAPTER_CONFIG, f"{ADAPTER}.safetensors")
"""What an adapter's folder holds."""
LIMIT = 1 << 24
"""Most bytes of a configuration."""


def standard_file(directory: Path) -> Path | None:
    """The weights under a standard name; of one file and an index of shards, the one file, as transformers takes it."""
    for name in STANDARD:
        for suffix in (".safetensors", ".safetensors.index.json"):
            if (directory / f"{name}{suffix}").is_file():
                return directory / f"{name}{suffix}"
    return None


def weights_name(directory: Path) -> str | None:
    """The name under which the weights of such a directory are written, None for a directory without a configuration."""
    if (directory / OPEN_CLIP_CONFIG).is_file():
        return OPEN_CLIP
    if not (directory / CONFIG).is_file():
        return None
    return DIFFUSERS if "_class_name" in (read_json(directory / CONFIG) or {}) else TRANSFORMERS


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None if there is none that can be read."""
    try:
        found = json.loads(path.read_bytes()) if path.stat().st_size <= LIMIT else None
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
