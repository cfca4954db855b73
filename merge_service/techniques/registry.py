"""Every technique there is: ours, those that installed packages bring, and those declared in this process.

Invariant: a name has one meaning. Our names are never another's, and what cannot be used says why when it is asked for.
"""

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from merge_service.errors import TechniqueError
from merge_service.techniques.catalogue import ELEMENTWISE
from merge_service.techniques.catalogue_tensors import TENSORWISE
from merge_service.techniques.definition import Origin, Technique
from merge_service.techniques.params import nearest

GROUP = "temporal_merge.techniques"
"""The entry points by which packages bring techniques."""
BUILT_IN = {technique.name: technique for technique in (*ELEMENTWISE, *TENSORWISE)}
ALIASES = {"lines": "lines_task_arithmetic", "dare_linear": "dare"}

_declared: dict[str, Technique] = {}


def names() -> tuple[str, ...]:
    """The canonical names, in the order a person should read about them."""
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
    """Make a technique known that is written at `origin`; again is no harm. Raises TechniqueError if its name is another's."""
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
    """All techniques that are not ours: installed ones and those declared in this process."""
    return {
        **{name: found for name, found in _installed().items() if isinstance(found, Technique)},
        **_declared,
    }


def broken() -> dict[str, str]:
    """Installed techniques that cannot be used, by name, and why."""
    return {name: found for name, found in _installed().items() if isinstance(found, str)}


def forget_table() -> None:
    """What techniques there are has changed."""
    _table.cache_clear()


@cache
def _table() -> dict[str, Technique]:
    return {**BUILT_IN, **others()}


@cache
def _installed() -> dict[str, Technique | str]:
    answer: dict[str, Technique | str] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        if entry.name in BUILT_IN:
            answer[entry.name] = (
                f"{_package(entry)} brings a technique of the name of a built-in one; rename it there"
            )
        elif entry.name in answer:
            answer[entry.name] = f"two packages bring it, one is {_package(entry)}; uninstall one"
        else:
            answer[entry.name] = _loaded(entry)
    return answer


def _loaded(entry: EntryPoint) -> Technique | str:
    try:
        found = entry.load()
    except Exception as error:  # whatever somebody's module does when it is imported
        return f"{_package(entry)}: {entry.value} cannot be loaded ({type(error).__name__}: {error})"
    if not isinstance(found, Technique) or found.name != entry.name:
        return f"{_package(entry)}: {entry.value} is not a technique called {entry.name}"
    return found


def _package(entry: EntryPoint) -> str:
    return f"package {entry.dist.name}" if entry.dist else "a package"


def _place(origin: Origin) -> str:
    return f"{origin.module} (source {origin.source[:12]})"
