"""The tokenizer files of a model folder, read and extended as JSON; no tokenizer library is loaded and no code of a folder runs.

Invariant: a token keeps its id; new tokens get the ids after the largest one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_service.checkpoints import parts_of
from merge_service.errors import UserError

FILE, CONFIG, ADDED, TEMPLATE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_LIMIT = 1 << 28
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


@dataclass(frozen=True)
class Tokenizer:
    """The vocabulary of a folder: ids by token, in order of id, and how each added token is matched."""

    folder: Path
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]


def folder_of(model: Path, *names: str) -> Path:
    """The folder of a model; of an adapter on a base, the first of both with one of these files."""
    folders = [part if part.is_dir() else part.parent for part in parts_of(model)]
    return next((one for one in folders if any((one / name).is_file() for name in names)), folders[0])


def tokenizer_of(model: Path) -> Tokenizer | None:
    """The tokenizer of a model; None without a tokenizer.json or vocab.json."""
    folder = folder_of(model, FILE, "vocab.json")
    tree = _json(folder / FILE)
    try:
        if tree is not None:
            held = tree["model"]["vocab"]
            pairs = held.items() if isinstance(held, dict) else ((one[0], at) for at, one in enumerate(held))
            added = {str(one["content"]): one for one in tree.get("added_tokens") or ()}
            ids = {str(token): int(at) for token, at in pairs} | {
                token: int(one["id"]) for token, one in added.items()
            }
        else:
            plain = _json(folder / "vocab.json")
            if plain is None:
                return None
            ids, added = {str(token): int(at) for token, at in plain.items()}, {}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise UserError(
            f"{folder / FILE} is no tokenizer that can be read: it has no vocabulary of tokens and ids"
        ) from None
    return Tokenizer(folder, dict(sorted(ids.items(), key=lambda pair: pair[1])), added)


def extended(of: Tokenizer, new: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, str]:
    """The files that say the same tokenizer with further tokens, each with the way it is matched; by name."""
    if not new:
        return {}
    tree = _json(of.folder / FILE)
    if tree is None:
        raise UserError(
            f"{of.folder} has no {FILE}, to which tokens could be added; save its tokenizer as a fast one first"
        )
    begin = max(of.ids.values(), default=-1) + 1
    entries = [{**_PLAIN, **how, "id": begin + at, "content": token} for at, (token, how) in enumerate(new)]
    tree["added_tokens"] = [*(tree.get("added_tokens") or []), *entries]
    texts = {FILE: _text(tree)}
    config = _json(of.folder / CONFIG)
    if config is not None and isinstance(config.get("added_tokens_decoder"), dict):
        more = {str(one["id"]): {key: value for key, value in one.items() if key != "id"} for one in entries}
        texts[CONFIG] = _text({**config, "added_tokens_decoder": {**config["added_tokens_decoder"], **more}})
    listed = _json(of.folder / ADDED)
    if listed is not None:
        texts[ADDED] = _text({**listed, **{str(one["content"]): one["id"] for one in entries}})
    return texts


def template_of(model: Path) -> str | None:
    """The chat template of a model; None without one. Of several that are named, the default."""
    folder = folder_of(model, TEMPLATE, CONFIG)
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    found = (_json(folder / CONFIG) or {}).get(
        "chat_template", (_json(folder / "chat_template.json") or {}).get("chat_template")
    )
    if isinstance(found, list):
        found = next(
            (one.get("template") for one in found if isinstance(one, dict) and one.get("name") == "default"),
            None,
        )
    return found if isinstance(found, str) else None


def with_template(folder: Path, texts: Mapping[str, str], template: str) -> dict[str, str]:
    """The files that give the tokenizer of `folder` (already changed by `texts`) this chat template."""
    known = texts.get(CONFIG)
    config = json.loads(known) if known is not None else _json(folder / CONFIG)
    found = {**texts, TEMPLATE: template}
    if config is not None and "chat_template" in config:
        found[CONFIG] = _text({key: value for key, value in config.items() if key != "chat_template"})
    return found


def _text(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes()) if path.stat().st_size <= _LIMIT else None
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
