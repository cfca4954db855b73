"""Owned words: words for the classes of never-replayed sets of the mini suite (digits, animals).

Such a word in the training data would teach an expert these classes.
Invariant: no picture whose name or caption has an owned word is in a set that an expert may train on.
"""

import re

from workers.data.mini.scans import ANIMALS, DIGITS

_OWNED = frozenset({*ANIMALS, *DIGITS, "ten", "digit", "digits", "number", "numbers", "keycap", "hundred"})


def is_owned(name: str) -> bool:
    """Whether a name has an owned word, in the singular or plural, or a digit."""
    words = re.findall(r"[a-z]+|\d", name.lower())
    return any(word in _OWNED or word.removesuffix("s") in _OWNED or word.isdigit() for word in words)
