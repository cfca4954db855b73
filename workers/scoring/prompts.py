"""Classes that a model cannot distinguish, because their prompts have equal tokens.

A tokenizer may map two names to the same tokens (CLIP's lower-cases), and it truncates at its context length. Such classes have one
text feature, so every picture of both is assigned to the first.
Invariant: the result depends on the tokenizer, the class names and the templates only.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

Tokens = Callable[[Sequence[str]], torch.Tensor]


def alike(tokens: Tokens, classes: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """Groups of different names whose tokens are equal in every prompt, in the order of the classes.

    `tokens` returns int64 [N, context] for N texts; `templates` hold `{c}` in place of the name.
    """
    groups = [list(dict.fromkeys(classes))]
    for template in templates:
        groups = [part for group in groups for part in _parted(tokens, group, template)]
    return groups


def is_cut(tokens: Tokens, names: Sequence[str]) -> bool:
    """Whether truncation is the reason why names are alike: the tokens of the bare names differ, or they fill the context."""
    padding, rows = tokens([""])[0, -1], tokens(names)
    return bool((rows != rows[0]).any() or rows[0, -1] != padding)


def alike_in(
    directory: Path, classes: Sequence[str], templates: Sequence[str]
) -> list[tuple[list[str], bool]]:
    """As `alike`, with the tokenizer of a weights directory; each group with `is_cut`. Raises UserError if there is no tokenizer."""
    from workers.models.model import tokenizer

    tokens = tokenizer(directory)
    return [(group, is_cut(tokens, group)) for group in alike(tokens, classes, templates)]


def _parted(tokens: Tokens, names: Sequence[str], template: str) -> list[list[str]]:
    """Groups of names with equal tokens in one prompt; names without a partner are left out."""
    if not names:
        return []
    found: dict[bytes, list[str]] = {}
    for name, row in zip(
        names, tokens([template.replace("{c}", name) for name in names]).numpy(), strict=True
    ):
        found.setdefault(row.tobytes(), []).append(name)
    return [group for group in found.values() if len(group) > 1]
