"""What tensor names say: which tower a tensor is in, how deep, and over what set thresholds are taken.

Names are those of open_clip: `visual.` starts the image tower, everything else (with logit_scale) is the text tower.
Blocks are counted per tower, because towers of one model may differ in depth (ViT-L/14 has 24 and 12).
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from merge_service.errors import TechniqueError

LN_100 = math.log(100)
_BLOCK = re.compile(r"(?:^|\.)(?:resblocks|encoder\.layers?|trunk\.blocks)\.(\d+)\.")
_SHAPES = {"linear": lambda x: x, "quadratic": lambda x: x * x, "sqrt": math.sqrt}


def tower(name: str) -> str:
    """ "image" or "text"."""
    return "image" if name.startswith("visual.") else "text"


def group(name: str, granularity: str) -> str:
    """The set of tensors that shares thresholds and a majority sign with `name`.

    A checkpoint without an image tower has one group under "tower", which is the same as "model".
    """
    return {"model": "model", "tower": tower(name), "tensor": name}[granularity]


def is_logit_scale(name: str) -> bool:
    """CLIP's log temperature, which training keeps at or below ln(100)."""
    return name.rpartition(".")[2] == "logit_scale"


def layer(name: str) -> int | None:
    """The number of the transformer block a tensor belongs to, None outside blocks.

    Known paths: `resblocks.<i>.` (CLIP), `encoder.layer(s).<i>.` (Hugging Face text towers), `trunk.blocks.<i>.` (timm).
    """
    found = _BLOCK.search(name)
    return int(found[1]) if found else None


def matrices_of(name: str, shape: tuple[int, ...], *, split: bool) -> list[tuple[int, int, tuple[int, int]]]:
    """The matrices in a tensor: start and stop in its elements, and (rows, columns). None for what is no matrix.

    open_clip keeps attention's q, k and v in one `attn.in_proj_weight` [3d, d]; with `split` they are three.
    """
    if len(shape) != 2 or 0 in shape:
        return []
    rows, columns = shape
    parts = 3 if split and name.endswith("attn.in_proj_weight") and rows == 3 * columns else 1
    step = rows // parts
    return [(k * step * columns, (k + 1) * step * columns, (step, columns)) for k in range(parts)]


def depth_factors(names: Iterable[str], params: Mapping[str, Any]) -> dict[str, float]:
    """LiNeS factors: alpha + beta * shape(i / (L - 1)) for block i of a tower of L blocks, alpha outside blocks.

    A tower of a single block has no depth to grow over: that block gets alpha. Source: LiNeS, arXiv 2410.17146, eq. 4,
    with the shapes of TIME's code. Raises `TechniqueError` when no tensor is in a numbered block at all.
    """
    layers = {name: layer(name) for name in names}
    depth: dict[str, int] = {}
    for name, number in layers.items():
        if number is not None:
            depth[tower(name)] = max(depth.get(tower(name), 0), number + 1)
    if not depth:
        raise TechniqueError(
            "LiNeS scales by depth, but no tensor name holds a block number such as resblocks.<i>.; "
            "use the same technique without lines_ and with scale"
        )
    alpha, beta, shape = params["lines_alpha"], params["lines_beta"], _SHAPES[params["lines_shape"]]

    def factor(name: str, number: int | None) -> float:
        last = depth.get(tower(name), 1) - 1
        return alpha if number is None or last == 0 else alpha + beta * shape(number / last)

    return {name: factor(name, number) for name, number in layers.items()}
