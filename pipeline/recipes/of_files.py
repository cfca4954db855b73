"""The recipe of a merge of files, so that a merge given on the command line can be made again from a file.

Most merges write one file and no recipe, so what recipes are checked with (pydantic, yaml) is imported only for a folder.

Invariant: carrying the recipe out gives the bytes of the merge.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.merging.files import FileMerge, settled

if TYPE_CHECKING:
    from pipeline.recipes.model import Recipe


def recipe_of(what: FileMerge) -> "Recipe":
    """The recipe of a merge of files. Definitions of others (`parity`) become our own parameters; what a list says of each expert stands
    with the expert, because a list in a recipe is a gradient over depth. Raises UserError for a technique or parameter that does not exist.
    """
    from merge_service.techniques import get
    from merge_service.timelines import translate_merge
    from pipeline.recipes.model import Expert, Merge, Recipe

    params = dict(translate_merge(what.technique, what.params, what.parity, len(what.experts)))
    get(what.technique).resolve(params, "merge", strict=True)
    weights = params.pop("weights", None) or [None] * len(what.experts)
    each = isinstance(params.get("density"), list | tuple)
    densities = params.pop("density") if each else [None] * len(what.experts)
    ids = what.ids or [None] * len(what.experts)
    measured = what.statistics or [None] * len(what.experts)
    experts = tuple(
        Expert(
            model=str(path),
            id=name,
            weight=weight,
            density=density,
            statistics=None if file is None else str(file),
        )
        for path, name, weight, density, file in zip(what.experts, ids, weights, densities, measured)
    )
    merge = Merge(
        technique=what.technique, base=None if what.base is None else str(what.base), experts=experts, parameters=params,
        dtype=what.dtype, any_base=what.any_base, strip_prefix=what.strip_prefix,
    )  # fmt: skip
    return Recipe(merges=(merge,))


def with_texts(what: FileMerge) -> FileMerge:
    """The merge with a card and its recipe beside the weights, if these go into a directory."""
    is_file = what.out.name.endswith((".safetensors", ".safetensors.index.json"))
    if is_file or what.as_study or not what.experts:
        return what
    from pipeline.recipes.card import beside

    what = settled(what)
    return replace(what, texts=beside(recipe_of(what)))
