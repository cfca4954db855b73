"""The inputs of a merge as the text that names them in a header, so that one more costs one more, not all again.

A file names what it was made of, and a service makes a file for each arrival: after a thousand, to parse and write a thousand entries
again is a third of what a small arrival costs.

Invariant: `text` is what `json.dumps(entries, sort_keys=True)` gives, however the inputs came together.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import overload

Entry = dict[str, str]
_ID = '"id": '
"""Appears once in each entry: inside a string its quotes would have backslashes."""


class Inputs(Sequence[Entry]):
    """Entries of inputs in their order: "id", and if known "file" and "sha256".

    Raises ValueError for a text that is no list of such entries; what is inside of the entries is looked at when they are read.
    """

    def __init__(self, text: str) -> None:
        if text[:1] != "[" or text[-1:] != "]":
            raise ValueError(f"{text[:40]!r} is no list of inputs")
        self.text, self._count = text, text.count(_ID)

    @classmethod
    def of(cls, entries: Iterable[Mapping[str, str]]) -> "Inputs":
        """The inputs with these entries."""
        return entries if isinstance(entries, cls) else cls(json.dumps([*entries], sort_keys=True))

    def then(self, more: Iterable[Mapping[str, str]]) -> "Inputs":
        """These inputs, and more after them."""
        after = Inputs.of(more)
        between = ", " if len(self) and len(after) else ""
        return Inputs(f"{self.text[:-1]}{between}{after.text[1:]}")

    def has(self, name: str) -> bool:
        """Whether an input has this id."""
        return _ID + json.dumps(name) in self.text

    @cached_property
    def _entries(self) -> list[Entry]:
        found = json.loads(self.text)
        if len(found) != self._count or not all(isinstance(one, dict) and "id" in one for one in found):
            raise ValueError(f"{self.text[:40]!r} is no list of inputs")
        return list(found)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> Entry: ...
    @overload
    def __getitem__(self, at: slice) -> list[Entry]: ...
    def __getitem__(self, at: int | slice) -> Entry | list[Entry]:
        return self._entries[at]

    def __eq__(self, other: object) -> bool:
        return self.text == other.text if isinstance(other, Inputs) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.text)


def spliced(record: Mapping[str, object]) -> str:
    """`json.dumps(record, sort_keys=True)`, in which inputs are the text that they are."""
    parts = (
        f"{json.dumps(key)}: {value.text if isinstance(value, Inputs) else json.dumps(value, sort_keys=True)}"
        for key, value in sorted(record.items())
    )
    return f"{{{', '.join(parts)}}}"
