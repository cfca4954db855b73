"""The words that the never-replayed sets of the mini suite own.

Invariant: no picture whose name or caption has one of them is in a set that an expert may train on, so that neither the digits
nor the ten animals of a never-replayed set are ever named in an expert's training.
"""

import re

from workers.data.mini_scans import ANIMALS, DIGITS

_OWNED = frozenset({*ANIMALS, *DIGITS, "ten", "digit", "digits", "number", "numbers", "keycap", "hundred"})


def is_owned(name: str) -> bool:
    """Whether the name has an owned word, in the singular or plural, or a digit."""
    words = re.findall(r"[a-z]+|\d", name.lower())
    return any(word in _OWNED or word.removesuffix("s") in _OWNED or word.isdigit() for word in words)
