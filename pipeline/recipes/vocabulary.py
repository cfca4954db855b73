"""Whether the tokenizers of the inputs have the same vocabulary, so that row i of every embedding means the same token.

Invariant: nothing is merged over different vocabularies where a recipe says whose tokenizer the output has.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_service.errors import UserError


def check_alike(models: Sequence[Path]) -> None:
    """Raise UserError if two of these models have tokenizers that give some id different tokens."""
    first: tuple[Path, Mapping[int, str]] | None = None
    for model in models:
        found = _vocabulary(model if model.is_dir() else model.parent)
        if found is None:
            continue
        if first is None:
            first = (model, found)
            continue
        place, known = first
        differing = sorted(at for at in known.keys() | found.keys() if known.get(at) != found.get(at))
        if differing:
            at = differing[0]
            raise UserError(
                f"tokenizer: {place} and {model} have different vocabularies: id {at} is {known.get(at)!r} and {found.get(at)!r}, "
                f"{len(differing)} ids differ; vocabularies are not merged yet, so give models that share one"
            )


def _vocabulary(folder: Path) -> dict[int, str] | None:
    """Tokens by id, of a tokenizer.json or a vocab.json; None without either."""
    try:
        tree: Any = json.loads((folder / "tokenizer.json").read_bytes())
        held = tree["model"]["vocab"]
        pairs = held.items() if isinstance(held, dict) else ((one[0], at) for at, one in enumerate(held))
        added = [(one["content"], one["id"]) for one in tree.get("added_tokens") or ()]
        return {int(at): str(token) for token, at in (*pairs, *added)}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        pass
    try:
        return {int(at): str(token) for token, at in json.loads((folder / "vocab.json").read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None
