"""Values that many steps name, each written once; a list that extends another is written as the items it adds.

The replay of a stream and the experts of a merge grow by one with every task, so a plan that repeated them would grow with their square.

Invariant: `Known(values.bodies)[values.of(value)] == value`.
"""

import json
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Name = TypeVar("Name")


class Prefixes(Generic[Item, Name]):
    """Finds for each list the longest known list that it begins with: exact, and linear in the number of new items."""

    def __init__(self) -> None:
        self._next: dict[tuple[int, Any], int] = {}
        self._named: dict[int, Name] = {}
        self._texts: dict[int, tuple[Any, str]] = {}

    def add(self, items: Sequence[Item], name: Name) -> tuple[Name | None, Sequence[Item]]:
        """(the name of the longest known beginning or None, the items after it); `items` bears `name` from now on.

        A list that is known already keeps its name, and no items remain.
        """
        node, known, length = 0, self._named.get(0), 0
        for place, item in enumerate(items, start=1):
            node = self._next.setdefault((node, self._key(item)), len(self._next) + 1)
            found = self._named.get(node)
            if found is not None:
                known, length = found, place
        self._named.setdefault(node, name)
        return known, items[length:]

    def _key(self, item: Any) -> Any:
        if type(item) is str:
            return item
        if type(item) is list and all(type(one) is str for one in item):
            return tuple(item)
        text = self._texts.get(id(item))
        if text is None:  # the item is kept, so that its id is not reused
            text = self._texts[id(item)] = item, json.dumps(item)
        return text[1].encode()


class Values:
    """The lists and mappings in specs, each once; a list may extend another.

    `of` returns the number of a value in `bodies`, whose entries are {"value": V} or {"extends": number, "by": [...]}.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, object]] = []
        self._lists, self._others = Prefixes[object, int](), dict[str, int]()
        self._seen: dict[int, tuple[object, int]] = {}

    def of(self, value: object) -> int:
        known = self._seen.get(id(value))
        if known is None:
            number = self._of_list(value) if isinstance(value, list) else self._of_other(value)
            known = self._seen[id(value)] = value, number
        return known[1]

    def _of_list(self, items: list[object]) -> int:
        number = len(self.bodies)
        known, rest = self._lists.add(items, number)
        if known is not None and not rest:
            return known
        self.bodies.append({"value": items} if known is None else {"extends": known, "by": rest})
        return number

    def _of_other(self, value: object) -> int:
        number = self._others.setdefault(json.dumps(value), len(self.bodies))
        if number == len(self.bodies):
            self.bodies.append({"value": value})
        return number


class Known:
    """Values by number; decoded values are cached."""

    def __init__(self, bodies: Sequence[object]) -> None:
        self._bodies, self._made = list(bodies), dict[int, Any]()

    def __getitem__(self, number: int) -> Any:
        chain = []
        while number not in self._made:
            body: Any = self._bodies[number]
            body = json.loads(body) if isinstance(body, str) else body
            chain.append((number, body))
            if "extends" not in body:
                break
            number = body["extends"]
        for made, body in reversed(chain):
            start = self._made[body["extends"]] if "extends" in body else None
            self._made[made] = body["value"] if start is None else [*start, *body["by"]]
        return self._made[chain[0][0] if chain else number]
