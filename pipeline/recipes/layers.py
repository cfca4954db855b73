"""From a checked merge to the groups of tensors that the engine makes: slices of layers, modules, and depths of tensors.

Blocks are found by name (`merge_service.anatomy`). The layers of a model that is put together from slices are numbered anew; what
stands before the blocks comes from the models of the first slice, what stands after them from those of the last.

Invariant: every tensor of the output belongs to one group, and no model is read beyond its layers.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from merge_service.anatomy import ByName, anatomy_of
from merge_service.checkpoints import Rows, locate, open_weights, parts_of
from merge_service.errors import CheckpointError, TechniqueError
from merge_service.merging import Group, Seen
from merge_service.techniques import nearest
from pipeline.recipes.configuration import layers_changed
from pipeline.recipes.model import Expert, Merge, Slice
from pipeline.recipes.operators import Choice, Chooser
from pipeline.recipes.settings import rules, value_at

_BEFORE = re.compile(
    r"(?:^|[._])(?:embed\w*|wte|wpe|\w*embeddings?|shared|conv1|ln_pre|patch\w*|project_in|cls_token)(?:[._]|$)"
)
_TOWERS = {
    "text_decoder": "text", "text_model": "text", "language_model": "text", "vision_tower": "image", "vision_model": "image",
    "vision_encoder": "image", "visual": "image", "audio_tower": "audio",
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """The groups of a merge, and what changes in the configuration of its output, by key path."""

    groups: tuple[Group, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)

    def over(self, rows: Mapping[Path, Rows]) -> "Made":
        """The same with each model seen over another vocabulary, by its path."""

        def seen(one: Seen) -> Seen:
            return replace(one, rows=rows.get(one.path))

        groups = tuple(
            replace(one, base=one.base and seen(one.base), members=tuple(map(seen, one.members)))
            for one in self.groups
        )
        return Made(groups, self.changes) if rows else self


@dataclass(frozen=True)
class _Place:
    """A tensor of the output: its depth 0..1, and its names in the experts."""

    t: float
    theirs: tuple[str, ...]


def made_of(merge: Merge) -> Made:
    """The groups of a merge whose models are paths. Raises UserError for layers or names that a model does not have."""
    if merge.slices:
        return _sliced(merge, merge.slices, None, [merge.parameters])
    if not merge.modules:
        base = None if merge.base is None else Expert(model=merge.base)
        return Made((_plain(merge, merge.experts, base, None, [merge.parameters]),))
    parts = _members(merge)
    groups: list[Group] = []
    changes: dict[str, Any] = {}
    for name, module in merge.modules.items():
        levels = [module.parameters, merge.parameters]
        if module.slices:
            found = _sliced(merge, module.slices, parts[name], levels)
            groups += found.groups
            changes |= found.changes
        else:
            base = None if merge.base is None else Expert(model=merge.base)
            groups.append(_plain(merge, module.experts, base, parts[name], levels))
    return Made(tuple(groups), changes)


def _plain(
    merge: Merge,
    experts: Sequence[Expert],
    base: Expert | None,
    names: Sequence[str] | None,
    levels: Sequence[Mapping[str, Any]],
) -> Group:
    """A group of whole models, or of the tensors `names` of them."""
    _refuse_layers([*experts, *([base] if base else [])])
    anatomy = _anatomy(Path((base or experts[0]).model))
    depths = {stack: depth for tower in anatomy.stacks.values() for stack, depth in tower.items()}
    places = {}
    for name in anatomy.shapes:
        stack, number = anatomy.block.get(name, ("", 0))
        last = depths.get(stack, 1) - 1
        t = 0.0 if name not in anatomy.block else number / last if last else 1.0
        places[name] = _Place(t, (name,) * len(experts))
    own = None if names is None else {name: name for name in names}
    return _group(
        merge, levels, [(one, own) for one in experts], None if base is None else (base, own), places
    )


def _sliced(
    merge: Merge, slices: Sequence[Slice], names: Sequence[str] | None, levels: Sequence[Mapping[str, Any]]
) -> Made:
    """The groups of a model of slices; of the tensors `names` only, if given."""
    groups, start = [], 0
    taken: list[int] = []
    for at, piece in enumerate(slices):
        models = [*([piece.base] if piece.base else []), *piece.experts]
        lengths = {_layers(one)[1] - _layers(one)[0] for one in models}
        if len(lengths) != 1 or min(lengths) < 1:
            raise TechniqueError(
                f"slices[{at}]: its models have {', '.join(f'{one.model} {list(_layers(one))}' for one in models)}; all need equally many "
                "layers, at least one"
            )
        (length,) = lengths
        ends = (at == 0, at == len(slices) - 1)
        seen = [_numbered(one, start, ends, _same_outside(slices), names) for one in models]
        reference = seen[0]
        experts = seen[1:] if piece.base else seen
        places = {
            name: _Place(t, tuple(one.get(name, (name, 0.0))[0] for one in experts))
            for name, (_, t) in reference.items()
        }
        named = [{name: there for name, (there, _) in one.items()} for one in seen]
        base = (piece.base, named[0]) if piece.base else None
        members = list(zip(piece.experts, named[1:] if piece.base else named))
        groups.append(_group(merge, [piece.parameters, *levels], members, base, places))
        taken += range(*_layers(models[0]))
        start += length
    first = slices[0].base or slices[0].experts[0]
    return Made(tuple(groups), layers_changed(Path(first.model), _depth(first, names), taken))


def _group(
    merge: Merge,
    levels: Sequence[Mapping[str, Any]],
    members: Sequence[tuple[Expert, Mapping[str, str] | None]],
    base: tuple[Expert, Mapping[str, str] | None] | None,
    places: Mapping[str, _Place],
) -> Group:
    chooser = Chooser(merge.technique, levels, [one for one, _ in members])

    def choose(name: str) -> Choice:
        place = places.get(name, _Place(0.0, (name,) * len(members)))
        return chooser.at(name, place.t, place.theirs)

    seen = [
        Seen(Path(one.model), names, _factors(one, at, places)) for at, (one, names) in enumerate(members)
    ]
    related = len({one.layers for one, _ in (*members, *([base] if base else []))}) == 1
    return Group(None if base is None else Seen(Path(base[0].model), base[1]), tuple(seen), choose, related)


def _factors(expert: Expert, at: int, places: Mapping[str, _Place]) -> dict[str, float]:
    """The factors of an expert's tensors, by the output's names, where they are not 1."""
    found = rules(expert.factor)
    factors = (
        {name: value_at(found, place.theirs[at], place.t) for name, place in places.items()} if found else {}
    )
    wrong = next((one for one in factors.values() if isinstance(one, bool | str)), None)
    if wrong is not None:
        raise TechniqueError(f"{expert.model}: factor is {wrong!r}, not a number")
    return {name: float(value) for name, value in factors.items() if value not in (None, 1)}


def _numbered(
    expert: Expert, start: int, ends: tuple[bool, bool], same: bool, only: Sequence[str] | None
) -> dict[str, tuple[str, float]]:
    """The tensors that a slice takes from a model: by name in the output the model's own name and the depth 0..1."""
    anatomy = _anatomy(Path(expert.model))
    low, high = _layers(expert)
    stack, depth = _stack(expert, only)
    if not 0 <= low < high <= depth:
        raise TechniqueError(f"{expert.model} has the layers 0 to {depth} ({stack}), not {low} to {high}")
    found: dict[str, tuple[str, float]] = {}
    for name in anatomy.shapes if only is None else only:
        held, number = anatomy.block.get(name, ("", -1))
        if held == stack and number >= 0:
            if low <= number < high:
                rest = name.removeprefix(f"{stack}." if stack else "").split(".", 1)[1]
                t = (number - low) / (high - low - 1) if high - low > 1 else 1.0
                found[".".join([*([stack] if stack else []), str(start + number - low), rest])] = (name, t)
        elif ends[0] if same or _BEFORE.search(name) else ends[1]:
            found[name] = (name, 0.0)
    return found


def _same_outside(slices: Sequence[Slice]) -> bool:
    """Whether first and last slice are made alike, so that it does not matter which of them a tensor outside blocks comes from."""
    first, last = (
        [
            (one.model, one.weight, one.density, one.factor)
            for one in (*([piece.base] if piece.base else []), *piece.experts)
        ]
        for piece in (slices[0], slices[-1])
    )
    return first == last and slices[0].parameters == slices[-1].parameters


def _stack(expert: Expert, only: Sequence[str] | None) -> tuple[str, int]:
    """The one stack of blocks of a model, or of its tensors `only`, and its depth."""
    anatomy = _anatomy(Path(expert.model))
    held = {
        anatomy.block[name][0] for name in (anatomy.shapes if only is None else only) if name in anatomy.block
    }
    if len(held) != 1:
        what = "has no numbered blocks" if not held else f"has the stacks {', '.join(sorted(held))}"
        raise TechniqueError(
            f"{expert.model} {what}; slices need one stack: name a part of the model under modules"
        )
    (stack,) = held
    if "<s>" in stack:
        raise TechniqueError(
            f"{expert.model} has blocks in stages ({stack}), which cannot be cut into slices"
        )
    return stack, next(tower[stack] for tower in anatomy.stacks.values() if stack in tower)


def _depth(expert: Expert, only: Sequence[str] | None) -> int:
    return _stack(expert, only)[1]


def _layers(expert: Expert) -> tuple[int, int]:
    if expert.layers is None:
        raise TechniqueError(f"{expert.model} is in a slice and needs layers: [from, to]")
    return expert.layers


def _refuse_layers(experts: Sequence[Expert]) -> None:
    wrong = next((one for one in experts if one.layers is not None), None)
    if wrong is not None:
        raise TechniqueError(f"{wrong.model} has layers, which belong into slices")


def _members(merge: Merge) -> dict[str, list[str]]:
    """The tensors of every module: those with its name as a part of theirs, else those of the tower that it means.

    Raises TechniqueError for a module that no tensor belongs to, and for tensors that no module has.
    """
    anatomy = _anatomy(Path(merge.models[0]))
    left = list(anatomy.shapes)
    found: dict[str, list[str]] = {}
    towers = set(anatomy.tower.values())
    for name in merge.modules:
        tower = _TOWERS.get(name, name)
        if tower not in towers and name != "default":
            found[name] = [one for one in left if one.startswith(f"{name}.") or f".{name}." in one]
            left = [one for one in left if one not in set(found[name])]
    for name in merge.modules:
        if name not in found:
            tower = _TOWERS.get(name, name)
            found[name] = [one for one in left if name == "default" or anatomy.tower[one] == tower]
            left = [one for one in left if one not in set(found[name])]
    empty = next((name for name, names in found.items() if not names), None)
    if empty is not None:
        known = sorted({*towers, *(one.split(".")[0] for one in anatomy.shapes)})
        raise TechniqueError(
            f"no tensor of {merge.models[0]} belongs to the module {empty!r}{nearest(empty, known)}; it has {', '.join(known)}"
        )
    if left:
        raise TechniqueError(
            f"{left[0]} and {len(left) - 1} other tensors belong to no module; add one that they begin with"
        )
    return found


@lru_cache(maxsize=64)
def _read(path: Path, changed: int) -> ByName:
    with open_weights(path) as held:
        return anatomy_of({name: info.shape for name, info in held.tensors.items()})


def _anatomy(path: Path) -> ByName:
    """The anatomy of a model; that of an adapter is its base's."""
    path = parts_of(path)[0]
    if not path.exists():
        raise CheckpointError(
            f"{path} is not there; models are paths on this machine: download it first, for instance with `hf download`"
        )
    return _read(path, locate(path).stat().st_mtime_ns)
