"""The open_clip configurations beside the inputs of a merge. One of them goes with the result, so they must agree.

Invariant: only keys that two configurations both have can disagree; a configuration that cannot be read disagrees with none.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_service.checkpoints.checkpoint import CONFIG_FILE
from merge_service.errors import IncompatibleCheckpoint


def check_alike(sources: Sequence[Path | str]) -> None:
    """Raise IncompatibleCheckpoint if two inputs expect different pixels or activations: no merge is right for both."""
    read = {Path(source): _read(Path(source) / CONFIG_FILE) for source in sources}
    first = next((place for place, found in read.items() if found), None)
    for place, found in read.items():
        if first is None or not found:
            continue
        both = read[first].keys() & found.keys()
        differing = sorted(key for key in both if read[first][key] != found[key])
        if differing:
            said = "; ".join(f"{key} {read[first][key]} and {found[key]}" for key in differing[:5])
            raise IncompatibleCheckpoint(
                f"{first / CONFIG_FILE} and {place / CONFIG_FILE} differ in {said}: the merged model could be right for one of them "
                "only. Correct the one that is wrong, or name a .safetensors file for the result, which has no configuration"
            )


def _read(file: Path) -> Mapping[str, Any]:
    """What affects how pixels are processed: the keys of preprocess_cfg, and the activation."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        model, pixels = found.get("model_cfg") or {}, found.get("preprocess_cfg") or {}
        said = {f"preprocess_cfg.{key}": value for key, value in pixels.items() if value is not None}
        return {"model_cfg.quick_gelu": bool(model.get("quick_gelu", False)), **said}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
