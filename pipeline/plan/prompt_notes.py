"""Notes on classes of a study's datasets that a model cannot distinguish, computed once per tokenizer and list of names.

Invariant: a cached answer needs no torch, so that only the first plan of a study takes the time.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from merge_service.checkpoints import CONFIG_FILE
from pipeline.identity import fingerprint
from workers.data.cache import Access, recall, remember
from workers.data.manifest import describe

REVISION = 1
SHOWN = 3


def prompt_notes(directory: Path, root: str, datasets: Iterable[str], cache: Path) -> list[str]:
    """A note for every dataset with classes that a model's tokenizer does not distinguish.

    `directory` is the weights directory of the model, of which only configuration and tokenizer are read. Raises
    UserError.
    """
    tokenizer = _text_configuration(directory)
    found = []
    for name in dict.fromkeys(datasets):
        info = describe(root, name, cache)
        if info.kind != "classification":
            continue
        if len(info.classes) == 1:
            found.append(
                f"dataset {name!r} has one class, so every model scores 1 on it: it measures nothing"
            )
            continue
        kept = (
            cache
            / "prompts"
            / f"{fingerprint([REVISION, tokenizer, info.classes, info.templates])[:32]}.json"
        )
        groups = None
        with suppress(ValueError):  # a file cut by a crash of the machine is computed again
            groups = json.loads(recall(kept) or "")
        if groups is None:
            from workers.scoring.prompts import alike_in

            try:
                groups = alike_in(directory, info.classes, info.templates)
            except (OSError, ValueError, ImportError) as error:  # its later use raises the full error
                why = (str(error).strip().splitlines() or [type(error).__name__])[0]
                return [
                    f"class names were not compared: the tokenizer of {directory} cannot be loaded ({why})"
                ]
            remember(kept, json.dumps(groups), Access.of(Path(root)))
        if groups:
            found.append(_note(name, groups))
    return found


def _text_configuration(directory: Path) -> list[str]:
    """Digests of what the tokenizer of a weights directory depends on: its configuration, and the files beside the weights."""
    config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    files = [path for path in sorted(directory.iterdir()) if "token" in path.name or "vocab" in path.name]
    return [
        fingerprint(config["model_cfg"].get("text_cfg")),
        *(fingerprint(path.read_bytes().hex()) for path in files),
    ]


def _note(dataset: str, groups: list[tuple[list[str], bool]]) -> str:
    shown = [
        f"{_listed(names)} ({'they differ only beyond the context, where they are cut off' if cut else 'the tokenizer writes them alike'})"
        for names, cut in groups[:SHOWN]
    ]
    more = f"; and {len(groups) - SHOWN} more groups" if len(groups) > SHOWN else ""
    return (
        f"dataset {dataset!r}: classes have the same tokens in every prompt and cannot be told apart: {'; '.join(shown)}{more}. "
        "Name them apart in classnames.txt"
    )


def _listed(names: list[str]) -> str:
    """The names, each shortened in its middle, because long names differ at the end."""
    short = [repr(name if len(name) <= 50 else f"{name[:20]} ... {name[-20:]}") for name in names]
    return ", ".join(short[:SHOWN]) + (f" and {len(names) - SHOWN} others" if len(names) > SHOWN else "")
