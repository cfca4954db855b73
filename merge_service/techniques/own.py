"""Techniques that somebody else wrote: installed by a package, or declared in a program that uses this one.

A technique of one's own is a function over the aligned blocks of all experts, in order (task vectors, or weights), or a rule as ours
are: a class that takes one expert at a time, asks for numbers of whole tensors, or sees tensors whole. Everything else is the
engine's: files, memory, threads, dtypes, tied and integer tensors, `scale`, logit_scale, numbers that are not finite.

Invariant: no file can name code to load. It comes from installed packages (entry points of the group
`temporal_merge.techniques`) or from a module that the program has imported itself; what determines its result is known by
the sha256 of the file it is written in (not of what that file imports).
"""

import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from merge_service.errors import TechniqueError
from merge_service.techniques import registry
from merge_service.techniques.definition import LOGIT_SCALE, SCALE, Origin, Technique
from merge_service.techniques.joint import Own, Together
from merge_service.techniques.params import Param
from merge_service.techniques.rule import Combining
from merge_service.techniques.thinning import KeepAll

Function = Callable[[Any, dict[str, Any], list[Any]], Any]


def technique(
    name: str,
    *,
    formula: str,
    paper: str = "",
    params: Sequence[Param] = (),
    space: Literal["task_vectors", "weights"] = "task_vectors",
    arity: int | None = None,
    thin: type[KeepAll] = KeepAll,
) -> Callable[[Function | type[Combining]], Technique]:
    """Declare a technique: a decorator of `rule(xp, params, blocks)`, which returns the combined block, or of a class of rules.

    `blocks` has one array per expert, oldest first, all of one shape and dtype: their task vectors, or with
    `space="weights"` their weights. `xp` is numpy, or torch where blocks lie on a device; use what both have. A block is any
    part of a tensor, so the rule must be elementwise. `arity` is the number of experts it takes, if it takes no other. The
    technique also has the parameters `scale` (the factor of the combined task vector) and `logit_scale`; its forms are
    merge and fold. A class (a `Rule`, `Together` or `TensorRule`) is made with the parameters; unless it is a `Together` it has
    the stream form too. `thin` is how task vectors are thinned out (`thinning.py`), whose parameters are then among `params`.
    Raises TechniqueError for a name that is taken.
    """

    def declare(rule: Function | type[Combining]) -> Technique:
        common = (SCALE, LOGIT_SCALE) if space == "task_vectors" else (LOGIT_SCALE,)
        combine: Callable[[Mapping[str, Any]], Combining]
        if isinstance(rule, type):
            combine, streams = rule, arity is None and not issubclass(rule, Together)
        else:
            combine, streams = partial(Own, name, rule), False
        forms = frozenset({"merge", "fold", *(("stream",) if streams else ())})
        made = Technique(
            name, formula, paper, (*params, *common), combine, space, thin,
            forms=forms, arity=arity, origin=_origin(name, rule),
        )  # fmt: skip
        register(made)
        return made

    return declare


def register(made: Technique) -> None:
    """Make a technique known in this process; again is no harm. Raises TechniqueError if its name is another's."""
    if made.origin is None:
        raise TechniqueError(f"{made.name} has no rule of its own; declare it with @technique(...)")
    registry.add(made, made.origin)


def load(name: str, origin: Origin) -> None:
    """Know a technique that another process uses. Raises TechniqueError if it is not there, or not the same."""
    found = registry.others().get(name)
    if found is None:
        try:
            importlib.import_module(origin.module)
        except ImportError as error:
            raise TechniqueError(
                f"technique {name!r} is written in the module {origin.module}, which cannot be imported here ({error}); "
                "install it on every node"
            ) from error
        found = registry.others().get(name)
    if found is None or found.origin is None or found.origin.source != origin.source:
        raise TechniqueError(
            f"the module {origin.module} here does not hold the same technique {name!r} as on the machine that asks for it; "
            "install one version on every node"
        )


def check_importable(used: Technique) -> None:
    """Raise TechniqueError if other processes could not load it, because it is written in the program itself."""
    if used.origin is not None and used.origin.module == "__main__":
        raise TechniqueError(
            f"technique {used.name!r} is written in the program itself, where no worker finds it; move it to a module of its own "
            "and import that, or install it as a package"
        )


def _origin(name: str, rule: Function | type[Combining]) -> Origin:
    try:
        file = inspect.getsourcefile(rule)
        content = (
            Path(file).read_bytes() if file and Path(file).is_file() else inspect.getsource(rule).encode()
        )
    except (OSError, TypeError) as error:
        raise TechniqueError(
            f"the source of technique {name!r} cannot be read ({error}), so its results could not be told from another's; "
            "write it in a file"
        ) from error
    return Origin(rule.__module__, hashlib.sha256(content).hexdigest())
