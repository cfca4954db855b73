"""What tensor names say of a model: its towers, its stacks of blocks, how deep in its stack every tensor lies.

Names differ from library to library, so nothing here knows a model. The rule: the outermost component of a name that is a
number is the number of a block, and what stands before it names the stack, whose depth is its largest number + 1. Where blocks
come in stages (`stages.<s>.blocks.<i>`, `layers.<s>.blocks.<i>`, `blocks.<s>.<i>`, `layer<s>.<i>`) they are counted on from stage
to stage; what a stage holds outside its blocks counts with its first one (with its last one where the first stage holds such a
thing too: it then stands at the end). A tensor is in the tower that the first word for one in its name says.

Not every list is a stack: the layers of a projection, a stem or a head are numbered as well. A list in a part of such a name, or of
bare layers beside a stack of blocks, is a *sequence*, outside blocks.

Invariant: a list that is neither clearly a stack nor clearly a sequence is never given a depth, nor a constant: `factors` refuses
it by name.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from merge_service.errors import TechniqueError

LN_100 = math.log(100)
IMAGE, TEXT, AUDIO, ENCODER, DECODER, WHOLE = "image", "text", "audio", "encoder", "decoder", "model"
Shapes = Mapping[str, tuple[int, ...]]

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
_SHAPES = {"linear": lambda x: x, "quadratic": lambda x: x * x, "sqrt": math.sqrt}


def modality(name: str) -> str:
    """The side of a CLIP that a tensor or module is of: "image" ("audio" in models of sound), else "text"."""
    return next((side for part in name.split(".") if (side := _side(part))), TEXT)


@cache
def _side(word: str) -> str | None:
    """The side that one component of a name speaks of."""
    found = None if word.isdigit() else _MODALITY.fullmatch(word)
    return found.lastgroup if found else None


@cache
def _is_blocks(word: str) -> bool:
    """Whether a component is a usual name of a list of blocks."""
    return bool(_BLOCKS.fullmatch(word))


def is_logit_scale(name: str) -> bool:
    """CLIP's log temperature, which training keeps at or below ln(100)."""
    return name.rpartition(".")[2] == "logit_scale"


def is_statistic(name: str) -> bool:
    """Running statistics of a BatchNorm: measured on data, not trained."""
    return name.rpartition(".")[2] in ("running_mean", "running_var")


@dataclass(frozen=True)
class Anatomy:
    """The towers and stacks of one model. `tower` is by tensor, `block` (its stack, its number) by tensor in a stack.

    `stacks` are by tower: the depth of every stack in it. `sequences` and `unclear` are lists outside blocks and lists that
    could be either, with the number of their entries.
    """

    tower: Mapping[str, str]
    block: Mapping[str, tuple[str, int]]
    stacks: Mapping[str, Mapping[str, int]]
    sequences: Mapping[str, int]
    unclear: Mapping[str, int]

    def group(self, name: str, granularity: str) -> str:
        """The set of tensors that shares thresholds and a majority sign with `name`."""
        return {WHOLE: WHOLE, "tower": self.tower[name], "tensor": name, "row": name}[granularity]

    def layer(self, name: str) -> int | None:
        """The number of the block a tensor is in, None outside blocks."""
        return self.block[name][1] if name in self.block else None

    def factors(self, names: Iterable[str], params: Mapping[str, Any]) -> dict[str, float]:
        """LiNeS: alpha + beta * shape(i / (L - 1)) for block i of a stack of L blocks, alpha outside blocks.

        A stack of a single block has no depth to grow over: that block gets alpha. Source: LiNeS, arXiv 2410.17146, eq. 4, with
        the shapes of TIME's code. Raises `TechniqueError` when no tensor is in a block, or some list is unclear.
        """
        without = "use the same technique without lines_ and with scale"
        if self.unclear:
            lists = ", ".join(f"{name}.<0..{count - 1}>" for name, count in self.unclear.items())
            raise TechniqueError(
                f"LiNeS scales by depth, but it is not clear whether {lists} is a stack of blocks beside "
                f"{described(self.stacks)}; {without}"
            )
        if not self.block:
            raise TechniqueError(
                f"LiNeS scales by depth, but no tensor name holds a block number such as resblocks.<i>.; {without}"
            )
        alpha, beta, shape = params["lines_alpha"], params["lines_beta"], _SHAPES[params["lines_shape"]]
        depths = {stack: depth for stacks in self.stacks.values() for stack, depth in stacks.items()}

        def factor(name: str) -> float:
            stack, number = self.block.get(name, ("", 0))
            last = depths.get(stack, 1) - 1
            return alpha if not last else alpha + beta * shape(number / last)

        return {name: factor(name) for name in names}


def described(stacks: Mapping[str, Mapping[str, int]]) -> str:
    """Stacks by tower for people: `image: visual.transformer.resblocks (12 blocks); text: transformer.resblocks (12 blocks)`."""

    def blocks(depths: Mapping[str, int]) -> str:
        known = (
            f"{name or 'the model itself'} ({depth} block{'s' * (depth != 1)})"
            for name, depth in depths.items()
        )
        return ", ".join(known) or "no numbered blocks"

    return "; ".join(f"{tower}: {blocks(depths)}" for tower, depths in stacks.items())


@dataclass(frozen=True)
class _Entry:
    """Where a tensor stands in a list: the stage and the number in it (None: outside the blocks of its stage)."""

    list: str
    stage: int
    number: int | None
    rest: tuple[str, ...]


def anatomy_of(shapes: Shapes) -> Anatomy:
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

    return Anatomy(towers, block, dict(sorted(by_tower.items())), of("sequence"), of("unclear"))


class _List:
    """A numbered list of modules: all tensors whose names say that they are in it."""

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
        """Whether its name is a usual one for blocks."""
        return _is_blocks(self.name.rpartition(".")[2].removesuffix("<s>"))

    @property
    def is_sequence(self) -> bool:
        """Whether its name says that it is no stack of blocks."""
        return any(_SEQUENCE.fullmatch(part) for part in self.name.split("."))

    @property
    def alike(self) -> bool:
        """Whether it has at least three entries, of equal tensors."""
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
    """Of every list whether it is a stack, a sequence, or unclear."""
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
    """The same for a list that is not clearly a stack by its name and content, beside those of its side that are."""
    if found.is_sequence:
        return "sequence"
    if not main:
        return "stack" if others == 1 else "unclear"
    if found.structured and found.depth in [stack.depth for stack in main]:
        return "stack"
    # one block has no depth to grow over: LiNeS gives it what lies outside blocks gets
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
    """Where a tensor stands by its name alone; a list without stages has stage -1."""
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
    """The tower of every tensor: its side, or encoder and decoder where the only side that there is has both."""
    if set(sides.values()) != {TEXT}:
        return dict(sides)
    if not {ENCODER, DECODER} <= {_coder(stack) for stack in stacks}:
        return dict.fromkeys(sides, WHOLE)
    return {name: _coder(name) or DECODER for name in sides}


def _coder(name: str) -> str | None:
    """ "encoder" or "decoder", whichever word a name has first."""
    return next((part for part in name.split(".") if part in (ENCODER, DECODER)), None)
