"""The weight of every expert in a mean or a sum: its share when it arrives, and relative to the remaining ones when it leaves.

Weights are the same in all tensors (`weights`, `schedule`), or one list for every tensor (`coefficients`).

Invariant: shares follow from parameters, the tensor's name and the expert's number alone, and from no later expert's weight, so a mean
can be continued one expert at a time. Equal weights of a mean give the numbers of none.
"""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from merge_service.errors import TechniqueError


def share(params: Mapping[str, Any], order: int, name: str = "") -> float:
    """The part of expert number `order` (1-based) in the weighted mean of experts 1..order, in the tensor `name`.

    fold and slerp: the second expert has `weight`. merge: w_n / (w_1 + ... + w_n), with w from `weights` or `coefficients`, or growing
    by `schedule`: linear i, sqrt, quadratic, cubic, exp 2^(i-1), log ln(i + 1) (TIME's non-uniform offline weighting).
    """
    if order == 1:
        return 1.0
    weights = weights_in(params, name, order)
    if weights is not None:
        total = math.fsum(weights)
        even = len(set(weights)) == 1 and total
        return 1 / order if even else weights[-1] / total if total else 0.0
    if "weight" in params:
        return float(params["weight"])
    if params.get("schedule", "uniform") == "uniform":
        return 1 / order
    if params["schedule"] == "exp":
        return 0.5 / (1 - 2.0**-order)  # 2^(n-1) / (2^n - 1) without the powers, which overflow
    growth = _GROWTH[params["schedule"]]
    return growth(order) / math.fsum(growth(i) for i in range(1, order + 1))


def factor(params: Mapping[str, Any], order: int, name: str = "") -> float:
    """The weight of expert number `order` in a ratio of weighted sums: relative to the first weight above zero, or by `schedule`, else 1.

    So equal weights are ones, and no weight depends on a later expert.
    """
    weights = weights_in(params, name, order)
    if weights is not None:
        return weights[-1] / next((one for one in weights if one), 1.0)
    schedule = params.get("schedule", "uniform")
    if schedule == "exp":
        return 2.0 ** (order - 1)
    return float(_GROWTH[schedule](order)) if schedule != "uniform" else 1.0


def is_weighed(params: Mapping[str, Any]) -> bool:
    """Whether task vectors have weights, the same in all tensors or by tensor."""
    return params.get("weights") is not None or params.get("coefficients") is not None


def weights_in(params: Mapping[str, Any], name: str, count: int) -> list[float] | None:
    """The weights of the first `count` experts in a tensor, as they were given; None if none were, or no pattern fits.

    They are `weights`, or those of `coefficients` under the tensor's name, else under the longest pattern that fits.
    """
    found, table = params.get("weights"), params.get("coefficients")
    if table is not None:
        fits = [pattern for pattern in table if fnmatchcase(name, pattern)]
        if name not in table and not fits:
            return None
        found = table[name if name in table else max(fits, key=lambda pattern: (len(pattern), pattern))]
    if found is None:
        return None
    if count > len(found):
        raise TechniqueError(f"weights has {len(found)} entries but there are at least {count} experts")
    return [float(one) for one in found[:count]]


def weight_of(params: Mapping[str, Any], order: int, name: str) -> float:
    """The factor of expert number `order` in a sum over a tensor: 1 without weights, 0 for a temperature that no pattern fits."""
    if not is_weighed(params):
        return 1.0
    found = weights_in(params, name, order)
    return found[-1] if found else 0.0


def parts(params: Mapping[str, Any], order: int, name: str) -> tuple[float, float]:
    """The factors of a sum so far and of what expert number `order` adds to it, in the tensor `name`.

    A merge adds with the expert's weight. A fold is a moving average, which the first expert starts.
    """
    if "weight" not in params:
        return 1.0, factor(params, order, name)
    return (0.0, 1.0) if order == 1 else (1 - params["weight"], params["weight"])


def leaving_share(params: Mapping[str, Any], order: int, count: int) -> float:
    """w / (W - w): an expert's weight over that of the `count` - 1 remaining experts when number `order` leaves the mean.

    Raises `TechniqueError` if that would change the weights of others, or leave no weight.
    """
    weights = weights_in(params, "", count)
    if weights is not None:
        rest = math.fsum(weights[: order - 1] + weights[order:])
        if not rest:
            raise TechniqueError("no expert that stays has a weight above zero; merge those that stay anew")
        return float(weights[order - 1] / rest)
    if params.get("schedule", "uniform") != "uniform" and order != count:
        raise TechniqueError(
            f"with schedule {params['schedule']} the weights of the experts after number {order} follow from their place, "
            "which changes when it leaves; only the newest can be taken out. Merge those that stay anew"
        )
    part = share(params, order) if order == count else 1 / count
    return part / (1 - part)


def weights_of(params: Mapping[str, Any], count: int, name: str = "") -> list[float]:
    """The weight of every expert in the mean of all, in the tensor `name`: its share when it arrived, less the shares of later ones."""
    left, weights = 1.0, []
    for order in range(count, 0, -1):
        part = share(params, order, name)
        weights.append(left * part)
        left *= 1 - part
    return weights[::-1]


_GROWTH = {
    "linear": lambda i: i,
    "sqrt": math.sqrt,
    "quadratic": lambda i: i * i,
    "cubic": lambda i: i**3,
    "log": lambda i: math.log(i + 1),
}
