"""The weights of the checkpoints in a window, by shape.

A constant learning rate followed by an average of the last W checkpoints stands for a decay of the learning rate (WSM, arXiv
2507.17634): if the steps between checkpoints j - 1 and j shall count with w_j, then checkpoint j gets c_j = w_j - w_{j+1}. The first
checkpoint of the window is j = 0 with w_0 = 1, and w_W = 0.

| shape | weight of checkpoint j = 0..W-1, oldest first | as a decay: w_j |
|---|---|---|
| mean | 1 / W | 1 - j/W, linear |
| linear | (j + 1) / (1 + ... + W) | 1 - j(j + 1) / (W(W + 1)) |
| 1-sqrt | sqrt((j + 1)/W) - sqrt(j/W) | 1 - sqrt(j/W) |
| cosine | of the decay | (1 + cos(pi j/W)) / 2 |
| ema | a(1 - a)^(W-1-j), the oldest without a; a = 2/(W + 1), or `ema:a` | 1 - (1 - a)^(W-j) |

`mean`, `linear` and `ema` are the SMA, WMA and EMA of pre-trained model averaging (arXiv 2505.12082).

Invariant: weights are positive and add up to 1.
"""

import math
from collections.abc import Callable

from merge_service.errors import TechniqueError


def _of_decay(decay: Callable[[float], float], window: int) -> list[float]:
    return [decay(j / window) - decay((j + 1) / window) for j in range(window)]


def _ema(window: int, alpha: float) -> list[float]:
    return [(1.0 if j == 0 else alpha) * (1 - alpha) ** (window - 1 - j) for j in range(window)]


SHAPES: dict[str, Callable[[int], list[float]]] = {
    "mean": lambda window: [1 / window] * window,
    "linear": lambda window: [2 * (j + 1) / (window * (window + 1)) for j in range(window)],
    "1-sqrt": lambda window: _of_decay(lambda x: 1 - math.sqrt(x), window),
    "cosine": lambda window: _of_decay(lambda x: (1 + math.cos(math.pi * x)) / 2, window),
    "ema": lambda window: _ema(window, 2 / (window + 1)),
}


def weights_of(shape: str, window: int) -> tuple[float, ...]:
    """The weights of `window` checkpoints, oldest first. Raises `TechniqueError` for an unknown shape or a window below 1."""
    if window < 1:
        raise TechniqueError(f"a window of {window} checkpoints holds nothing; give 1 or more")
    name, colon, alpha = shape.partition(":")
    if name == "ema" and colon:
        found = _ema(window, _alpha(shape, alpha))
    elif shape in SHAPES:
        found = SHAPES[shape](window)
    else:
        raise TechniqueError(f"there is no shape {shape!r}; choose of {', '.join(SHAPES)}, or ema:0.2")
    return tuple(found)


def _alpha(shape: str, text: str) -> float:
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not 0 < alpha < 1:
        raise TechniqueError(f"{shape}: the share of the newest checkpoint is between 0 and 1, as in ema:0.2")
    return alpha
