"""What every expert weighs in a mean: its share when it comes, and over those that stay when it leaves.

Shares follow from parameters and the expert's number alone, so that a mean may be continued one expert at a time.
"""

import math
from collections.abc import Mapping
from typing import Any

from merge_service.errors import TechniqueError


def share(params: Mapping[str, Any], order: int) -> float:
    """The part of expert number `order` (1-based) in the weighted mean of experts 1..order.

    fold and slerp: the second has `weight`. merge: w_n / (w_1 + ... + w_n), with w from `weights` or growing by `schedule`:
    linear i, sqrt, quadratic, cubic, exp 2^(i-1), log ln(i + 1) (TIME's non-uniform offline weighting).
    """
    if order == 1:
        return 1.0
    if "weight" in params:
        return float(params["weight"])
    if params.get("weights") is not None:
        if order > len(params["weights"]):
            raise TechniqueError(
                f"weights has {len(params['weights'])} entries but there are at least {order} experts"
            )
        total = math.fsum(params["weights"][:order])
        return float(params["weights"][order - 1] / total) if total else 0.0
    if params.get("schedule", "uniform") == "uniform":
        return 1 / order
    if params["schedule"] == "exp":
        return 0.5 / (1 - 2.0**-order)  # 2^(n-1) / (2^n - 1) without the powers, which overflow
    growth = _GROWTH[params["schedule"]]
    return growth(order) / math.fsum(growth(i) for i in range(1, order + 1))


def leaving_share(params: Mapping[str, Any], order: int, count: int) -> float:
    """w / (W - w): an expert's weight over that of the `count` - 1 experts that stay when number `order` leaves the mean.

    Raises `TechniqueError` where its leaving would change the weights of others, or leave no weight.
    """
    if params["weights"] is not None:
        weights = params["weights"][:count]
        rest = math.fsum(weights[: order - 1] + weights[order:])
        if not rest:
            raise TechniqueError("no expert that stays has a weight above zero; merge those that stay anew")
        return float(weights[order - 1] / rest)
    if params["schedule"] != "uniform" and order != count:
        raise TechniqueError(
            f"with schedule {params['schedule']} the weights of the experts after number {order} follow from their place, "
            "which changes when it leaves; only the newest can be taken out. Merge those that stay anew"
        )
    part = share(params, order) if order == count else 1 / count
    return part / (1 - part)


_GROWTH = {
    "linear": lambda i: i,
    "sqrt": math.sqrt,
    "quadratic": lambda i: i * i,
    "cubic": lambda i: i**3,
    "log": lambda i: math.log(i + 1),
}
