"""What a configuration must say differently about a model that was put together from layers of others.

Invariant: nothing is guessed: a configuration that does not tell its number of layers under a known name is refused.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_service.errors import TechniqueError

_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
    "depth",
)


def layers_changed(model: Path, depth: int, taken: Sequence[int]) -> dict[str, Any]:
    """By key path, what changes if blocks `taken` of a model of `depth` blocks make up the output; nothing without a configuration.

    Lists with an entry for each layer, such as `layer_types`, follow the layers. Raises TechniqueError if no number of layers is
    said.
    """
    if list(taken) == list(range(depth)):
        return {}
    path = (model if model.is_dir() else model.parent) / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except ValueError:
        raise TechniqueError(f"{path} is not JSON; correct it") from None
    counts, lists = {}, {}
    for key, value in _values(config, ""):
        word = key.rpartition(".")[2]
        if word in _COUNTS and value == depth:
            counts[key] = len(taken)
        elif "layer" in word and isinstance(value, list) and len(value) == depth:
            lists[key] = [value[at] for at in taken]
    if not counts:
        raise TechniqueError(
            f"{path} does not say under {', '.join(_COUNTS)} that there are {depth} layers; add it"
        )
    return {**counts, **lists}


def _values(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _values(value, f"{prefix}{key}.")
