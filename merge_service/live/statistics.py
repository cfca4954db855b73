"""Paired comparisons of two models on the same images: exact intervals for one dataset, bootstrap intervals for means over several.

Everything follows from counts: of n answers, `wins` that only the first model has right and `losses` that only the second has.
Invariant: no draw depends on anything but the seed, which callers take from the fingerprints of what is compared.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2_000
TAIL = 0.025
"""Each side of a 95 % interval."""


@dataclass(frozen=True)
class Paired:
    """Two models on the same n answers."""

    wins: int
    losses: int
    n: int

    @classmethod
    def of(cls, first: np.ndarray, second: np.ndarray) -> "Paired":
        """Counts of two boolean arrays [n] of right answers. Raises `ValueError` if their lengths differ."""
        if first.shape != second.shape or not first.size:
            raise ValueError(f"answers to {first.size} and {second.size} samples cannot be paired")
        return cls(int((first & ~second).sum()), int((~first & second).sum()), int(first.size))

    @property
    def difference(self) -> float:
        """Accuracy of the first minus that of the second."""
        return (self.wins - self.losses) / self.n


Answers = tuple[np.ndarray, ...]
"""Right or wrong for every sample of a dataset: one boolean array, or one for each direction of a retrieval set, whose score is their mean."""


@dataclass(frozen=True)
class Interval:
    """A difference with its 95 % interval."""

    difference: float
    low: float
    high: float


def score(answers: Answers) -> float:
    """The score of one dataset: the share that is right, averaged over directions."""
    return math.fsum(float(one.mean()) for one in answers) / len(answers)


def mcnemar(paired: Paired) -> Interval:
    """The exact interval of a difference, given the number of answers on which the two disagree.

    The share of wins among these is binomial; its Clopper-Pearson bounds, scaled by the share of disagreement, bound the difference.
    This is the interval that belongs to McNemar's exact conditional test.
    """
    apart = paired.wins + paired.losses
    if apart == 0:
        return Interval(0.0, 0.0, 0.0)
    low, high = _clopper_pearson(paired.wins, apart)
    share = apart / paired.n
    return Interval(paired.difference, share * (2 * low - 1), share * (2 * high - 1))


def proportion(successes: int, n: int) -> Interval:
    """A share of n >= 1 with its exact (Clopper-Pearson) interval."""
    return Interval(successes / n, *_clopper_pearson(successes, n))


def bootstrap(datasets: Sequence[Sequence[Paired]], seed: str) -> Interval:
    """The interval of a mean difference over datasets, each the mean of its directions, by resampling images within each.

    Resampling n images is one multinomial draw of wins and losses. `seed` is hexadecimal text.
    """
    if not datasets:
        return Interval(0.0, 0.0, 0.0)
    rng = np.random.default_rng([int(seed[at : at + 8], 16) for at in range(0, len(seed), 8)])
    total, found = np.zeros(DRAWS), 0.0
    for directions in datasets:
        for one in directions:
            shares = [one.wins / one.n, one.losses / one.n, (one.n - one.wins - one.losses) / one.n]
            drawn = rng.multinomial(one.n, shares, size=DRAWS)
            total += (drawn[:, 0] - drawn[:, 1]) / one.n / len(directions)
            found += one.difference / len(directions)
    low, high = np.quantile(total / len(datasets), [TAIL, 1 - TAIL])
    return Interval(found / len(datasets), float(low), float(high))


def pairs(first: Mapping[str, Answers], second: Mapping[str, Answers], name: str) -> tuple[Paired, ...]:
    """The paired counts of one dataset, by direction. Raises `ValueError` if the two were asked about other samples."""
    if len(first[name]) != len(second[name]):
        raise ValueError(f"{name}: the two were asked in {len(first[name])} and {len(second[name])} ways")
    return tuple(Paired.of(one, two) for one, two in zip(first[name], second[name]))


def together(directions: Sequence[Paired]) -> Paired:
    """All answers of one dataset as one count."""
    return Paired(
        sum(one.wins for one in directions), sum(one.losses for one in directions), sum(one.n for one in directions)
    )  # fmt: skip


def _clopper_pearson(wins: int, n: int) -> tuple[float, float]:
    """The bounds of a binomial share, each with TAIL on its side (Clopper and Pearson, 1934), by bisection."""
    low = 0.0 if wins == 0 else _root(lambda p: 1 - _cdf(wins - 1, n, p) - TAIL)
    high = 1.0 if wins == n else _root(lambda p: TAIL - _cdf(wins, n, p))
    return low, high


def _cdf(k: int, n: int, p: float) -> float:
    """P(X <= k) of a binomial variable."""
    if p in (0.0, 1.0):
        return 1.0 if p == 0.0 else float(k >= n)
    at = np.arange(k + 1)
    logs = _log_choose(n)[: k + 1] + at * math.log(p) + (n - at) * math.log1p(-p)
    return float(min(1.0, np.exp(logs).sum()))


def _log_choose(n: int) -> np.ndarray:
    steps = np.log(np.arange(n, 0, -1)) - np.log(np.arange(1, n + 1))
    return np.concatenate(([0.0], np.cumsum(steps)))


def _root(rising: Callable[[float], float]) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if rising(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
