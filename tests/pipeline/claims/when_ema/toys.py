"""Replicates of the study with invented scores and a known truth: H1 to H4 true, no effect at all, or all of it reversed."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pipeline.claims.when_ema.numbers import Numbers

SHARES = (0.0, 0.1, 0.2, 0.4, 0.66)
RATES = (1e-4, 3e-4, 1e-3)
WEIGHTS = (0.2, 0.5, 0.8, 0.95)
NAMES = tuple(f"share_{round(share * 100):02d}" for share in SHARES)
METRICS = ("ka", "zs", "zs_replayed", "zs_never_replayed", "gm")


@dataclass(frozen=True)
class World:
    """What is true: `sign` 1 for the hypotheses, 0 for no effect, -1 for their reverse; `apart` is latest -> ema less Best-in-TIME."""

    sign: float = 1.0
    apart: float = 0.0
    noise: float = 0.001
    replicates: int = 8
    seed: int = 0

    def best(self, share: float, lr: float) -> float:
        """The weight that is best: it falls with drift and rises with replay, or the other way round."""
        turn = 0.6 * np.log10(lr / 3e-4) - 0.6 * (share - 0.27)
        return float(np.clip(0.6 - self.sign * turn, 0.2, 0.95))

    def gain(self, share: float, lr: float, weight: float) -> float:
        """Of Best-in-TIME over fine-tuning: largest at the best weight, higher with drift, lower with replay, below 0 in the end."""
        top = self.sign * (0.02 * np.log10(lr / 1e-4) + 0.03 - 0.09 * share)
        bump = np.exp(-(((weight - self.best(share, lr)) / 0.15) ** 2))
        return float(top * bump if top > 0 else top) if self.sign else 0.0


def numbers(world: World = World(), names: tuple[str, ...] = NAMES) -> Numbers:
    """The core of such a world, as `read_numbers` would give it."""
    rng = np.random.default_rng(world.seed)
    points, experts, made = [], [], []
    for replicate, (share, name) in itertools.product(
        range(world.replicates), zip(SHARES, NAMES, strict=True)
    ):
        if name not in names:
            continue
        unit = {
            "piece": name, "replicate": replicate, "model": "s", "share": share, "pretraining": share / 2, "buffer": share / 2,
            "steps_per_task": 100, "tasks": 2,
        }  # fmt: skip
        made.append({**unit, "base_sha256": f"b{replicate}", "commit": "c", "minutes": 1.0})
        own = rng.normal(0, 0.02)
        points += [{**unit, **row} for row in _points(world, share, own, rng)]
        experts += [{**unit, **row} for row in _experts(rng)]
    return Numbers(pd.DataFrame(points), pd.DataFrame(experts), pd.DataFrame(made))


def _points(world: World, share: float, own: float, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    yield from _over_time(
        {"init": "base", "deploy": "base", "weight": None, "lr": None}, 0.3 + own, world, rng
    )
    for lr in RATES:
        level = 0.4 + own + 0.1 * share - 0.01 * (lr != 3e-4)
        yield from _over_time(
            {"init": "latest", "deploy": "latest", "weight": None, "lr": lr}, level, world, rng
        )
        for weight in WEIGHTS:
            gain = world.gain(share, lr, weight)
            for init, deploy, more in (
                ("latest", "ema", gain + world.apart),
                ("ema", "ema", gain),
                ("ema", "latest", 0.0),
            ):
                arm = {"init": init, "deploy": deploy, "weight": weight, "lr": lr}
                yield from _over_time(arm, level + more, world, rng)


def _over_time(
    arm: dict[str, Any], level: float, world: World, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    for t in range(3):
        scores = {split: (0.3 if t == 0 else level) + rng.normal(0, world.noise) for split in ("val", "test")}
        yield {
            **arm,
            "t": t,
            **{f"{name}_{split}": score for split, score in scores.items() for name in METRICS},
        }


def _experts(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    for lr, (init, weight), t in itertools.product(
        RATES, (("latest", None), *(("ema", w) for w in WEIGHTS)), (1, 2)
    ):
        drift = 10 * lr**0.8 * 100 * np.exp(rng.normal(0, 0.05))
        yield {
            "init": init, "weight": weight, "lr": lr, "t": t, "task": f"task{t}", "task_vector_norm": drift * t, "loss_first": 2.0, "loss_last": 1.0,
            "grad_first": 1.0, "grad_highest": 1.5, "grad_last": 0.5, "drift": drift, "relative_drift": drift / 10, "distance": drift, "cosine": 0.1,
            **{f"{name}_{place}": value for name in ("new", "old") for place, value in (("start", 1.0), ("middle", 1.1), ("end", 1.5 + drift))},
        }  # fmt: skip
