"""LiNeS: techniques whose factor grows with the depth of a tensor in its stack of blocks; it replaces `scale`."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from merge_service.anatomy.structure import some
from merge_service.techniques.definition import Technique
from merge_service.techniques.families import elections, sums
from merge_service.techniques.params import LOGIT_SCALE, Param
from merge_service.techniques.place import View
from merge_service.techniques.scaling import Factor

LINES = (
    Param("lines_alpha", "float", 0.5, "factor of the first block and of everything outside blocks"),
    Param("lines_beta", "float", 0.5, "what the factor grows by from the first block to the last"),
    Param(
        "lines_shape",
        "choice",
        "linear",
        "growth over depth x in [0, 1]: x, x squared, or the square root of x",
        choices=("linear", "quadratic", "sqrt"),
    ),
)
_SHAPES = {"linear": lambda x: x, "quadratic": lambda x: x * x, "sqrt": math.sqrt}


class ByDepth(Factor):
    """alpha + beta * shape(i / (L - 1)) for block i of a stack of L blocks, alpha outside blocks.

    The only block of a stack gets alpha. Source: LiNeS, arXiv 2410.17146, eq. 4, with the shapes of TIME's code. Names that do
    not tell the stacks are refused.
    """

    by_name = True

    def factors(self, view: View) -> Mapping[str, float]:
        if not view.merged:
            return {}
        anatomy = view.anatomy
        anatomy.require_blocks(
            "LiNeS scales by depth", "use the same technique without lines_ and with scale"
        )
        alpha, beta = view.params["lines_alpha"], view.params["lines_beta"]
        shape = _SHAPES[view.params["lines_shape"]]
        depths = {stack: depth for stacks in anatomy.stacks.values() for stack, depth in stacks.items()}

        def factor(name: str) -> float:
            stack, number = anatomy.block.get(name, ("", 0))
            last = depths.get(stack, 1) - 1
            return alpha if not last else alpha + beta * shape(number / last)

        return {name: factor(name) for name, _ in view.merged}

    def largest(self, params: Mapping[str, Any]) -> tuple[float, str]:
        alpha, beta = params["lines_alpha"], params["lines_beta"]
        return max(abs(alpha), abs(alpha + beta)), "(lines_alpha + lines_beta)"

    def remarks(self, view: View) -> Iterator[str]:
        anatomy = view.anatomy
        if anatomy.sequences:
            lists = [f"{name} ({count})" for name, count in anatomy.sequences.items()]
            yield f"numbered lists that are no stack of blocks have lines_alpha: {some(lists)}"
        bare = [tower for tower, stacks in anatomy.stacks.items() if not stacks]
        if bare:
            yield f"no numbered blocks in the {' and '.join(bare)} tower: everything there has lines_alpha"


def with_lines(technique: Technique) -> Technique:
    """The same technique with factors that grow with depth instead of `scale`."""
    params = tuple(p for p in technique.params if p.name not in ("scale", "logit_scale"))
    return replace(
        technique,
        name=f"lines_{technique.name}",
        formula=technique.formula.replace("scale", "g(layer)")
        + ";  g = lines_alpha + lines_beta · shape(layer / (L - 1)), outside blocks g = lines_alpha",
        paper=f"LiNeS, arXiv 2410.17146, on top of {technique.paper}",
        params=(*params, *LINES, LOGIT_SCALE),
        scale=ByDepth(),
        breaks={**technique.breaks, "P2": "every layer is scaled by its depth"},
        aliases=("lines",) if technique.name == "task_arithmetic" else (),
    )


_LINED = ("task_arithmetic", "ties", "dare_ties", "breadcrumbs_ties")
TECHNIQUES = tuple(with_lines(one) for one in (*sums.TECHNIQUES, *elections.TECHNIQUES) if one.name in _LINED)
