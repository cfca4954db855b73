"""Which classes a model cannot tell apart, because their prompts are the same tokens.

A tokenizer may write two names alike (CLIP's lower-cases), and it cuts at its context length. Such classes have one text
feature; every picture of theirs goes to the first of them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

Tokens = Callable[[Sequence[str]], torch.Tensor]


def alike(tokens: Tokens, classes: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """Groups of different names whose tokens are equal in every prompt, in the order of the classes.

    `tokens` gives int64 [N, context] for N texts; `templates` hold `{c}` where the name goes.
    """
    groups = [list(dict.fromkeys(classes))]
    for template in templates:
        groups = [part for group in groups for part in _parted(tokens, group, template)]
    return groups


def is_cut(tokens: Tokens, names: Sequence[str]) -> bool:
    """Whether it is for the length of the context that these names are alike: by themselves they differ, or fill it."""
    padding, rows = tokens([""])[0, -1], tokens(names)
    return bool((rows != rows[0]).any() or rows[0, -1] != padding)


def alike_in(
    directory: Path, classes: Sequence[str], templates: Sequence[str]
) -> list[tuple[list[str], bool]]:
    """The same with the tokenizer of a weights directory; each group with whether its prompts are cut."""
    from workers.models.model import tokenizer

    tokens = tokenizer(directory)
    return [(group, is_cut(tokens, group)) for group in alike(tokens, classes, templates)]


def _parted(tokens: Tokens, names: Sequence[str], template: str) -> list[list[str]]:
    """Names with the same tokens together; those that stand alone are left out."""
    if not names:
        return []
    found: dict[bytes, list[str]] = {}
    for name, row in zip(
        names, tokens([template.replace("{c}", name) for name in names]).numpy(), strict=True
    ):
        found.setdefault(row.tobytes(), []).append(name)
    return [group for group in found.values() if len(group) > 1]
