"""All techniques: built-in ones, those of installed packages, and those declared in this process.

Invariant: a name has one meaning. A built-in name cannot be taken, and a technique that cannot be used gives the reason when it
is requested.
"""

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from merge_service.errors import TechniqueError
from merge_service.techniques.definition import Origin, Technique
from merge_service.techniques.families import TECHNIQUES
from merge_service.techniques.params import nearest

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "temporal_merge.techniques"
"""The entry point group for techniques of packages."""
BUILT_IN = {technique.name: technique for technique in TECHNIQUES}
ALIASES = {alias: technique.name for technique in TECHNIQUES for alias in technique.aliases}

_declared: dict[str, Technique] = {}


def names() -> tuple[str, ...]:
    """The canonical names, in the order of the documentation."""
    return tuple(_table())


def get(name: str) -> Technique:
    """The technique called `name` (or an alias of it); raises `TechniqueError` naming the nearest one."""
    technique = _table().get(ALIASES.get(str(name), str(name)))
    if str(name) in broken():
        raise TechniqueError(f"technique {name!r} cannot be used: {broken()[str(name)]}")
    if technique is None:
        known = (*names(), *ALIASES)
        raise TechniqueError(
            f"unknown technique {name!r}{nearest(str(name), known)}; there are {', '.join(known)}"
        )
    return technique


def add(made: Technique, origin: Origin) -> None:
    """Register a technique that is defined at `origin`; repeating this changes nothing. Raises TechniqueError if its name is
    another's.
    """
    if made.name in BUILT_IN:
        raise TechniqueError(
            f"there is a technique {made.name!r} already; give yours (in {origin.module}) another name"
        )
    held = _declared.get(made.name)
    if held is not None and held.origin is not None and held.origin != origin:
        raise TechniqueError(
            f"{made.name!r} is declared twice: in {_place(held.origin)} and in {_place(origin)}; rename one"
        )
    _declared[made.name] = made
    forget_table()


def others() -> dict[str, Technique]:
    """All techniques that are not built in: installed ones and those declared in this process."""
    return {
        **{name: found for name, found in _installed().items() if isinstance(found, Technique)},
        **_declared,
    }


def broken() -> dict[str, str]:
    """Installed techniques that cannot be used, by name, and why."""
    return {name: found for name, found in _installed().items() if isinstance(found, str)}


def forget_table() -> None:
    """Drop the cached table after the set of techniques has changed."""
    _table.cache_clear()


@cache
def _table() -> dict[str, Technique]:
    return {**BUILT_IN, **others()}


def entries() -> "Iterable[EntryPoint]":
    """The entry points of techniques in installed packages."""
    from importlib.metadata import entry_points

    return entry_points(group=GROUP)


@cache
def _installed() -> dict[str, Technique | str]:
    answer: dict[str, Technique | str] = {}
    for entry in sorted(entries(), key=lambda entry: (entry.name, entry.value)):
        if entry.name in BUILT_IN:
            answer[entry.name] = (
                f"{_package(entry)} brings a technique of the name of a built-in one; rename it there"
            )
        elif entry.name in answer:
            answer[entry.name] = f"two packages bring it, one is {_package(entry)}; uninstall one"
        else:
            answer[entry.name] = _loaded(entry)
    return answer


def _loaded(entry: "EntryPoint") -> Technique | str:
    try:
        found = entry.load()
    except Exception as error:  # a package may raise anything when it is imported
        return f"{_package(entry)}: {entry.value} cannot be loaded ({type(error).__name__}: {error})"
    if not isinstance(found, Technique) or found.name != entry.name:
        return f"{_package(entry)}: {entry.value} is not a technique called {entry.name}"
    return found


def _package(entry: "EntryPoint") -> str:
    return f"package {entry.dist.name}" if entry.dist else "a package"


def _place(origin: Origin) -> str:
    return f"{origin.module} (source {origin.source[:12]})"
