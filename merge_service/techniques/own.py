"""Users' own techniques: installed by a package, or declared in a program that uses this one.

Such a technique is a function over the aligned blocks of all experts, in order (task vectors, or weights), or a rule like the
built-in ones: a class that takes one expert at a time, requests statistics of whole tensors, or works on whole tensors. The
engine handles everything else: files, memory, threads, dtypes, tied and integer tensors, `scale`, logit_scale, numbers that are
not finite.

Invariant: no data file can name code to load. Techniques come from installed packages (entry points of the group
`temporal_merge.techniques`), from a module that the program has imported itself, or from a file that a person named on the
command line (`files.py`). The sha256 of the file that defines a technique identifies its results; modules that this file imports
are not covered.
"""

import hashlib
import importlib
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from merge_service.errors import TechniqueError
from merge_service.techniques import registry
from merge_service.techniques.definition import Origin, Technique
from merge_service.techniques.files import import_file
from merge_service.techniques.params import LOGIT_SCALE, SCALE, Param
from merge_service.techniques.place import Array
from merge_service.techniques.rule import Blocks, Combining, Params, Places, Together
from merge_service.techniques.thinning import KeepAll

Function = Callable[[Any, dict[str, Any], list[Any]], Any]


class Own(Together):
    """A user's function as a rule; its result is checked."""

    def __init__(self, name: str, function: Function, params: Params) -> None:
        super().__init__(params)
        self.name, self.function = name, function

    def combined(self, xp: Any, blocks: Blocks, places: Places) -> Array:
        shape = blocks[0].shape
        made = self.function(xp, dict(self.params), list(blocks))
        if getattr(made, "shape", None) != shape:
            raise TechniqueError(
                f"{self.name} gave {type(made).__name__} of shape {getattr(made, 'shape', None)} for blocks of shape "
                f"{shape}; it must return one array of the blocks' shape"
            )
        return made


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

    `blocks` has one array per expert, oldest first, all of one shape and dtype: their task vectors, or with `space="weights"`
    their weights. `xp` is numpy, or torch if blocks lie on a device; use only what both have. A block is any part of a tensor, so
    the rule must be elementwise. `arity` is the number of experts, if it takes no other number. The technique also has the
    parameters `scale` (the factor of the combined task vector) and `logit_scale`; its forms are merge and fold. A class (a
    `Rule`, `Together` or `TensorRule`) is created with the parameters; unless it is a `Together` it has the stream form too.
    `thin` is how task vectors are thinned out (`thinning.py`); its parameters are then among `params`. Raises TechniqueError for
    a name that is taken.
    """

    def declare(rule: Function | type[Combining]) -> Technique:
        common = (SCALE, LOGIT_SCALE) if space == "task_vectors" else (LOGIT_SCALE,)
        made_of: Callable[[Params], Combining]
        if isinstance(rule, type):
            made_of, streams = rule, arity is None and not issubclass(rule, Together)
        else:
            made_of, streams = partial(Own, name, rule), False
        forms = frozenset({"merge", "fold", *(("stream",) if streams else ())})
        made = Technique(
            name, formula, paper, (*params, *common), made_of, space, thin,
            forms=forms, arity=arity, origin=_origin(name, rule),
        )  # fmt: skip
        register(made)
        return made

    return declare


def register(made: Technique) -> None:
    """Register a technique in this process; repeating this changes nothing. Raises TechniqueError if its name is another's."""
    if made.origin is None:
        raise TechniqueError(f"{made.name} has no rule of its own; declare it with @technique(...)")
    registry.add(made, made.origin)


def load(name: str, origin: Origin) -> None:
    """Register a technique that another process uses. Raises TechniqueError if it is missing or differs."""
    found = registry.others().get(name)
    if found is None:
        try:
            importlib.import_module(origin.module)
        except ImportError as error:
            if Path(origin.file).is_file():
                import_file(Path(origin.file))
                return load(name, origin)
            raise TechniqueError(
                f"technique {name!r} is written in the module {origin.module}, which cannot be imported here ({error}); "
                "install it on every node, or keep its file on storage that all nodes share"
            ) from error
        found = registry.others().get(name)
    if found is None or found.origin is None or found.origin.source != origin.source:
        raise TechniqueError(
            f"the module {origin.module} here does not hold the same technique {name!r} as on the machine that asks for it; "
            "install one version on every node"
        )


def check_importable(used: Technique) -> None:
    """Raise TechniqueError if other processes could not load the technique, because the program's own file defines it."""
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
            f"the source of technique {name!r} cannot be read ({error}), so its results cannot be identified; write it "
            "in a file"
        ) from error
    place = str(Path(file).absolute()) if file else ""
    return Origin(rule.__module__, hashlib.sha256(content).hexdigest(), place)
