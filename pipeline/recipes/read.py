"""Recipes from YAML: our own, or mergekit's, one document or a chain of several.

Invariant: as of `pipeline.study.yaml_input`, a file is plain values under limits; an unknown key is an error that names the nearest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.recipes.mergekit import translate
from pipeline.recipes.model import Merge, Recipe
from pipeline.study.mistakes import nearest, validate
from pipeline.study.yaml_input import read_all


@dataclass(frozen=True)
class Read:
    """A recipe, what language its file is in, and what the user should know about its translation."""

    recipe: Recipe
    language: str
    notes: tuple[str, ...] = ()


def read_recipe(path: Path, language: str | None = None) -> Read:
    """The recipe in a YAML file. `language` is ours ("temporal-merge") or "mergekit"; by default the file's own keys tell.

    Raises ConfigError with every mistake found.
    """
    documents = read_all(path)
    keys = set[str]().union(*documents) if documents else set[str]()
    found = language or ("mergekit" if "merge_method" in keys else "temporal-merge")
    if found == "mergekit":
        return _theirs(path, documents)
    if found != "temporal-merge":
        raise ConfigError(f"--from {found}: recipes are read in these languages: mergekit, temporal-merge")
    return Read(_ours(path, documents), found)


def _ours(path: Path, documents: Sequence[Mapping[str, Any]]) -> Recipe:
    if len(documents) == 1 and "merges" in documents[0]:
        tree: dict[str, Any] = dict(documents[0])
    else:
        tree = {"merges": list(documents)}
    known = ("technique", "merges", "merge_method")
    if len(documents) == 1 and not documents[0].keys() & {*known}:
        hints = [hint for key in documents[0] if (hint := nearest(key, known))]
        raise ConfigError(
            f"{path} is no recipe: it has neither technique nor merge_method{''.join(hints[:1])}"
        )
    recipe, problems = validate(Recipe, tree)
    if recipe is None:
        bare = "merges" not in documents[0] and len(documents) == 1
        raise ConfigError(
            [": ".join(filter(None, [str(path), one.key.removeprefix("merges[0]").lstrip("."), one.text.replace("merges[0].", "")]))
             if bare else f"{path}: {one.key}: {one.text}" for one in problems]
        )  # fmt: skip
    return recipe


def _theirs(path: Path, documents: Sequence[Mapping[str, Any]]) -> Read:
    merges: list[Merge] = []
    notes: list[str] = []
    for number, document in enumerate(documents, 1):
        where = f"{path}, document {number}" if len(documents) > 1 else str(path)
        made, said = translate(document, where)
        merges.append(made)
        notes += said
    recipe, problems = validate(Recipe, {"merges": [one.model_dump() for one in _in_order(merges, path)]})
    if recipe is None:
        raise ConfigError([f"{path}: {one.key}: {one.text}" for one in problems])
    return Read(recipe, "mergekit", tuple(dict.fromkeys(notes)))


def _in_order(merges: Sequence[Merge], path: Path) -> list[Merge]:
    """The merges with each after those that it uses; the one without a name last. Raises ConfigError for a circle."""
    names = {one.name for one in merges if one.name}
    left, done, found = sorted(merges, key=lambda one: one.name is None), set[str](), list[Merge]()
    while left:
        ready = next((one for one in left if names & set(one.models) <= done), None)
        if ready is None:
            raise ConfigError(
                f"{path}: the merges {', '.join(str(one.name) for one in left)} use each other in a circle"
            )
        left.remove(ready)
        found.append(ready)
        done |= {ready.name} if ready.name else set()
    return found
