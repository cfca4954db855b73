"""Towers, stacks of blocks and the depth of every tensor, read from tensor names and shapes.

Tensor names differ between libraries, so no rule is specific to a model:

- The outermost component of a name that is a number is a block number. The components before it name the stack, whose depth is
  its largest number + 1.
- Blocks may come in stages (`stages.<s>.blocks.<i>`, `layers.<s>.blocks.<i>`, `blocks.<s>.<i>`, `layer<s>.<i>`). Their numbers
  continue from stage to stage. A tensor of a stage outside its blocks counts with the stage's first block, or with its last block
  if the first stage has such a tensor too (it then stands at the end).
- The first component of a name that denotes a tower decides the tower.
- The layers of a projection, a stem or a head are numbered as well. Such a list, and a list of bare layers beside a stack of
  blocks, is a *sequence* and lies outside blocks.

Invariant: a list that is neither clearly a stack nor clearly a sequence never gets a depth. It is `unclear`, and `require_blocks`
raises an error that names it.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from merge_service.anatomy.linear import Linear, linear_of
from merge_service.anatomy.packed import Packing, Shapes
from merge_service.errors import TechniqueError

LN_100 = math.log(100)
IMAGE, TEXT, AUDIO, ENCODER, DECODER, WHOLE = "image", "text", "audio", "encoder", "decoder", "model"

_PART = "(?:_(?:model|tower|encoder|backbone|trunk|transformer|branch|proj|projection|projector|head|adapter|newline))?"
_MODALITY = re.compile(
    f"(?:(?P<image>visual|vision|image|img)|(?P<audio>audio|speech)|(?P<text>text|language)){_PART}"
)
_BLOCKS = re.compile(r"h|cross_attn|(?:.*_)?(?:layers?|blocks?|resblocks|stages?|layer_groups)")
_STAGE_WORD = re.compile(r"((?:.*_)?(?:layer|stage|block))(\d+)")
_SEQUENCE = re.compile(
    r"stem|neck|.*heads?|classifier|pooler|(?:.*_)?embed(?:ding|dings|s|_tokens)?|(?:.*_)?proj(?:ection|ections|ector|s)?"
    r"|.*merger.*|downsampl.*|dropout"
)


def modality(name: str) -> str:
    """The side of a CLIP that a tensor or module belongs to: "image" ("audio" in models of sound), else "text"."""
    return next((side for part in name.split(".") if (side := _side(part))), TEXT)


@cache
def _side(word: str) -> str | None:
    """The side that one component of a name denotes."""
    found = None if word.isdigit() else _MODALITY.fullmatch(word)
    return found.lastgroup if found else None


@cache
def _is_blocks(word: str) -> bool:
    """Whether a component is a usual name of a list of blocks."""
    return bool(_BLOCKS.fullmatch(word))


@dataclass(frozen=True)
class ByName:
    """An `Anatomy` by rules over names and shapes: the towers and stacks of one model.

    `tower` has every tensor, `block` (stack, number) every tensor in a stack. `stacks` gives the depth of every stack by tower.
    `sequences` and `unclear` give the number of entries of lists outside blocks, and of lists that could be either. `shapes` are
    those of all tensors.
    """

    tower: Mapping[str, str]
    block: Mapping[str, tuple[str, int]]
    stacks: Mapping[str, Mapping[str, int]]
    sequences: Mapping[str, int]
    unclear: Mapping[str, int]
    shapes: Shapes

    def group(self, name: str, granularity: str) -> str:
        """The set of tensors that share thresholds and a majority sign with `name`."""
        return {WHOLE: WHOLE, "tower": self.tower[name], "tensor": name, "row": name}[granularity]

    def layer(self, name: str) -> int | None:
        """The number of the block that a tensor is in, None outside blocks."""
        return self.block[name][1] if name in self.block else None

    def packing(self, beside: Path | None, *, split: bool) -> Packing:
        """The matrices in tensors, as far as names, shapes and a `config.json` beside the weights tell."""
        return Packing.of(self.shapes, beside, split=split)

    def linear(self, name: str) -> Linear | None:
        """By the last words of its name and by its shape."""
        return linear_of(name, tuple(self.shapes[name]))

    def is_scale(self, name: str) -> bool:
        """CLIP's log temperature."""
        return name.rpartition(".")[2] == "logit_scale"

    def is_statistic(self, name: str) -> bool:
        """Running statistics of a BatchNorm."""
        return name.rpartition(".")[2] in ("running_mean", "running_var")

    def require_blocks(self, what: str, instead: str) -> None:
        """As of `Anatomy`."""
        if self.unclear:
            lists = ", ".join(f"{name}.<0..{count - 1}>" for name, count in self.unclear.items())
            raise TechniqueError(
                f"{what}, but it is not clear whether {lists} is a stack of blocks beside {described(self.stacks)}; {instead}"
            )
        if not self.block:
            raise TechniqueError(
                f"{what}, but no tensor name holds a block number such as resblocks.<i>.; {instead}"
            )


def described(stacks: Mapping[str, Mapping[str, int]]) -> str:
    """Stacks by tower as text: `image: visual.transformer.resblocks (12 blocks); text: transformer.resblocks (12 blocks)`."""

    def blocks(depths: Mapping[str, int]) -> str:
        known = (
            f"{name or 'the model itself'} ({depth} block{'s' * (depth != 1)})"
            for name, depth in depths.items()
        )
        return ", ".join(known) or "no numbered blocks"

    return "; ".join(f"{tower}: {blocks(depths)}" for tower, depths in stacks.items())


def some(words: Sequence[str], shown: int = 3) -> str:
    """The first words of a list and the number of the others, as text."""
    more = len(words) - shown
    return ", ".join(words[:shown]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class _Entry:
    """The place of a tensor in a list: its stage, and its number there (None: outside the blocks of the stage)."""

    list: str
    stage: int
    number: int | None
    rest: tuple[str, ...]


def anatomy_of(shapes: Shapes) -> ByName:
    """The anatomy of the model that has tensors of these names and shapes."""
    entries = _entries(shapes)
    lists: dict[str, _List] = {}
    for name, entry in entries.items():
        lists.setdefault(entry.list, _List(entry.list)).take(name, entry, shapes[name])
    sides = {name: modality(name) for name in shapes}
    for found in lists.values():
        found.side = sides[found.names[0]]
    kinds = {found.name: kind for found, kind in _kinds(list(lists.values()))}
    stacks = [found for found in lists.values() if kinds[found.name] == "stack"]
    towers = _towers(sides, [found.name for found in stacks])
    by_tower: dict[str, dict[str, int]] = {towers[name]: {} for name in shapes}
    block: dict[str, tuple[str, int]] = {}
    for found in stacks:
        by_tower[towers[found.names[0]]][found.name] = found.depth
        block |= {name: (found.name, found.place(entries[name])) for name in found.names}

    def of(kind: str) -> dict[str, int]:
        return {found.name: found.depth for found in lists.values() if kinds[found.name] == kind}

    return ByName(towers, block, dict(sorted(by_tower.items())), of("sequence"), of("unclear"), shapes)


class _List:
    """A numbered list of modules, with all tensors in it."""

    def __init__(self, name: str) -> None:
        self.name, self.names, self.side = name, list[str](), TEXT
        self.sizes: dict[int, int] = {}
        self.extras: set[int] = set()
        self.structured = False
        self._parts: dict[tuple[int, int | None], set[Any]] = {}

    def take(self, name: str, entry: _Entry, shape: tuple[int, ...]) -> None:
        self.names.append(name)
        if entry.number is None:
            self.extras.add(entry.stage)
        self.sizes[entry.stage] = max(self.sizes.get(entry.stage, 1), (entry.number or 0) + 1)
        self.structured = self.structured or len(entry.rest) > 1
        self._parts.setdefault((entry.stage, entry.number), set()).add((entry.rest, shape))

    @property
    def is_known(self) -> bool:
        """Whether the name is a usual one for a list of blocks."""
        return _is_blocks(self.name.rpartition(".")[2].removesuffix("<s>"))

    @property
    def is_sequence(self) -> bool:
        """Whether the name is that of a list that is no stack of blocks."""
        return any(_SEQUENCE.fullmatch(part) for part in self.name.split("."))

    @property
    def alike(self) -> bool:
        """Whether the list has at least three entries, all with equal tensors."""
        parts = list(self._parts.values())
        return len(parts) >= 3 and all(part == parts[0] for part in parts)

    @property
    def depth(self) -> int:
        """Its number of blocks."""
        return sum(self.sizes.values())

    def place(self, entry: _Entry) -> int:
        """The number of a tensor's block, counted over stages."""
        before = sum(size for stage, size in self.sizes.items() if stage < entry.stage)
        if entry.number is not None:
            return before + entry.number
        return before + (self.sizes[entry.stage] - 1 if min(self.sizes) in self.extras else 0)


def _kinds(lists: list[_List]) -> Iterator[tuple[_List, str]]:
    """The kind of every list: stack, sequence or unclear."""
    for side in {found.side for found in lists}:
        ours = [found for found in lists if found.side == side]
        named = [found for found in ours if found.is_known and not found.is_sequence]
        solid = [found for found in named if found.structured]
        main = solid or named
        rest = [found for found in ours if found not in main]
        for found in rest:
            yield found, _beside(found, main, sum(not other.is_sequence for other in rest))
        yield from ((found, "stack") for found in main)


def _beside(found: _List, main: list[_List], others: int) -> str:
    """The kind of a list that is not clearly a stack by name and content, given the stacks of the same side (`main`)."""
    if found.is_sequence:
        return "sequence"
    if not main:
        return "stack" if others == 1 else "unclear"
    if found.structured and found.depth in [stack.depth for stack in main]:
        return "stack"
    # a single block has no depth: LiNeS scales it as it scales tensors outside blocks
    return "unclear" if (found.structured and found.depth > 1) or found.alike else "sequence"


def _entries(names: Iterable[str]) -> dict[str, _Entry]:
    found = {name: entry for name in names if (entry := _entry(name))}
    staged = {entry.list for entry in found.values() if entry.stage >= 0}
    return {
        name: _Entry(entry.list, entry.number, None, entry.rest)
        if entry.list in staged and entry.stage < 0 and entry.number is not None
        else entry
        for name, entry in found.items()
    }


def _entry(name: str) -> _Entry | None:
    """The place of a tensor by its name alone; a list without stages has stage -1."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isascii() and part.isdigit()]
    later = [place for place in numbers if place and _is_blocks(parts[place - 1])]
    if not numbers:
        return None
    place = (
        later[0] if numbers[0] == 0 and later else numbers[0]
    )  # a whole model may stand in a list: 0.auto_model.layers.3
    before, number, after = parts[:place], int(parts[place]), parts[place + 1 :]
    word, inner = before[-1] if before else "", [place + 1 in numbers, place + 2 in numbers]
    stage = _STAGE_WORD.fullmatch(word)
    if stage:
        return _Entry(".".join([*before[:-1], f"{stage[1]}<s>"]), int(stage[2]), number, tuple(after))
    if inner[0] and re.fullmatch(r"(?:.*_)?(?:stages?|blocks?)|features", word):
        return _Entry(".".join(before), number, int(after[0]), tuple(after[1:]))
    names = {"stages": "blocks layers", "stage": "block layer", "layers": "blocks"}.get(word, "").split()
    if inner[1] and after[0] in names:
        return _Entry(".".join(before), number, int(after[1]), tuple(after[2:]))
    return _Entry(".".join(before), -1, number, tuple(after))


def _towers(sides: Mapping[str, str], stacks: Iterable[str]) -> dict[str, str]:
    """The tower of every tensor: its side, or encoder and decoder if the only side has both."""
    if set(sides.values()) != {TEXT}:
        return dict(sides)
    if not {ENCODER, DECODER} <= {_coder(stack) for stack in stacks}:
        return dict.fromkeys(sides, WHOLE)
    return {name: _coder(name) or DECODER for name in sides}


def _coder(name: str) -> str | None:
    """ "encoder" or "decoder", whichever a name has first."""
    return next((part for part in name.split(".") if part in (ENCODER, DECODER)), None)
