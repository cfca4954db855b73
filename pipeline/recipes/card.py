"""What a merge writes beside the weights in a Hugging Face folder: a model card, and the recipe that makes the model again.

Invariant: the card names models by what they are called, not by where they lie; only the recipe has paths.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from merge_service.checkpoints import absolute, parts_of
from merge_service.techniques import get
from pipeline.merging.remote.near import with_slashes
from pipeline.recipes.model import Recipe

CARD, RECIPE = "README.md", "merge.yaml"


def beside(recipe: Recipe) -> dict[str, str]:
    """The card and the recipe, by name. Paths of models become absolute in the recipe."""
    names = {one.name for one in recipe.merges}
    models = [path for one in recipe.merges for path in one.models if path not in names]
    places = {path: with_slashes(str(absolute(path))) for path in models}
    again = Recipe(merges=tuple(one.with_models(places) for one in recipe.merges))
    return {CARD: _card(recipe, list(dict.fromkeys(models))), RECIPE: again.to_yaml()}


def _card(recipe: Recipe, models: Sequence[str]) -> str:
    called = {path: _called(Path(path)) for path in models}
    last = recipe.merges[-1]
    front = {
        "base_model": list(dict.fromkeys(called.values())),
        "library_name": _library([Path(path) for path in models]),
        "tags": ["merge", "temporal-merge", last.technique],
    }
    named = Recipe(merges=tuple(one.with_models(called) for one in recipe.merges))
    steps = "\n".join(
        f"- {f'{one.name}: ' if one.name else ''}`{one.technique}` of "
        + ", ".join(called.get(path, path) for path in one.models if path != one.base or len(one.models) == 1)
        + (f", from the base {called.get(one.base, one.base)}" if one.base else "")
        for one in recipe.merges
    )
    technique = get(last.technique)
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n# A merged model\n\n"
        f"Made with temporal-merge, without training:\n\n{steps}\n\n`{technique.name}`: {technique.formula} ({technique.paper}).\n\n"
        f"`{RECIPE}` makes the weights again: `temporal-merge merge {RECIPE} --out DIR`.\n\n```yaml\n{named.to_yaml()}```\n"
    )


def _called(path: Path) -> str:
    """The name of a model: the one of its hub if its configuration has it, else that of its folder or file. An adapter follows its
    base after a +.
    """
    return "+".join(map(_name, parts_of(path)))


def _name(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    said = _json(folder / "config.json").get("_name_or_path")
    if isinstance(said, str) and said.count("/") == 1 and not said.startswith((".", "/", "~")):
        return said
    return path.resolve().name.removesuffix(".safetensors")


def _library(paths: Sequence[Path]) -> str:
    folders = [part if part.is_dir() else part.parent for path in paths for part in parts_of(path)]
    if any((one / "modules.json").is_file() for one in folders):
        return "sentence-transformers"
    return (
        "diffusers" if any("_class_name" in _json(one / "config.json") for one in folders) else "transformers"
    )


def _json(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
