"""The gates: may this expert, and the candidate that holds it, be accepted?

The expert is judged alone first. A gate on the merged score alone lets noise pass, because it dilutes a merge towards the base, and
cosines separate nothing, because honest task vectors of different tasks are nearly orthogonal. Differences are paired, on the same
images; a margin says how much may be lost.

Invariant: a verdict is a function of counts, margins and a seed. Where there is too little to decide, it says `undecided`.
"""

from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from merge_service.live.entries import Verdict
from merge_service.live.statistics import (
    Answers,
    Interval,
    Paired,
    bootstrap,
    mcnemar,
    pairs,
    proportion,
    together,
)
from merge_service.live.values import digest

Outcome = Literal["pass", "fail", "undecided"]


@dataclass(frozen=True)
class Margins:
    """How much may be lost, in score, before a gate refuses; `solo` is what must be gained at least."""

    solo: float = 0.02
    accumulated: float = 0.02
    worst: float = 0.10
    held_out: float = 0.03
    drift: float = 0.05


@dataclass(frozen=True)
class Bounds:
    """Norms of a task vector must be within `low` to `high` times those of reference; a cosine above `copy` is a copy."""

    low: float = 0.25
    high: float = 4.0
    copy: float = 0.999
    fewest: int = 5


def verdict(gate: str, found: Interval, margin: float) -> Verdict:
    """Pass if the lower bound is at least -margin, fail if the upper bound is below it, else undecided."""
    outcome: Outcome = "undecided"
    if found.low >= -margin:
        outcome = "pass"
    elif found.high < -margin:
        outcome = "fail"
    return Verdict(gate, outcome, found.difference, found.low, found.high, margin)


def solo(name: str, expert: Answers, start: Answers, least: float) -> Verdict:
    """Whether an expert alone gained on its own dataset over the weights it started from.

    It must gain at least `least`, and surely something: the lower bound of the paired interval must be above 0. The verdict is never
    undecided: an expert that cannot be told from its start is of no use.
    """
    found = mcnemar(together([Paired.of(one, two) for one, two in zip(expert, start, strict=True)]))
    passed = found.difference >= least and found.low > 0
    return Verdict(
        f"solo.{name}", "pass" if passed else "fail", found.difference, found.low, found.high, least
    )


@dataclass(frozen=True)
class Judged:
    """A model's answers by dataset, and the fingerprint of the evaluation that they come from."""

    evaluation: str
    answers: Mapping[str, Answers]


def merge_gates(
    candidate: Judged,
    champion: Judged,
    best: Judged,
    accumulated: Sequence[str],
    held_out: Sequence[str],
    margins: Margins,
) -> tuple[Verdict, ...]:
    """Candidate against champion: the mean and the worst of accumulated datasets, and the mean of held-out ones; and against the best
    accepted time step so far (`drift`), over all of them, because small losses add up.

    A gate without datasets is left out.
    """
    seed = digest([candidate.evaluation, champion.evaluation, best.evaluation])
    found = []
    if accumulated:
        found.append(
            verdict("accumulated.mean", _mean(candidate, champion, accumulated, seed), margins.accumulated)
        )
        found.append(_worst(candidate, champion, accumulated, margins.worst))
    if held_out:
        found.append(verdict("held_out.mean", _mean(candidate, champion, held_out, seed), margins.held_out))
    every = [*accumulated, *held_out]
    if every:
        found.append(verdict("drift", _mean(candidate, best, every, seed), margins.drift))
    return tuple(found)


@dataclass(frozen=True)
class Observed:
    """What a candidate did on real requests, which the champion answered too. Of `requests`, it gave no finite answer to `failed`; of
    `pictures` that were classified, both said the same of `agreed`. Its answers took `seconds` together, the champion's `usual`."""

    requests: int = 0
    failed: int = 0
    pictures: int = 0
    agreed: int = 0
    seconds: float = 0.0
    usual: float = 0.0

    def __add__(self, other: "Observed") -> "Observed":
        return Observed(
            self.requests + other.requests, self.failed + other.failed, self.pictures + other.pictures,
            self.agreed + other.agreed, self.seconds + other.seconds, self.usual + other.usual,
        )  # fmt: skip


@dataclass(frozen=True)
class Tolerances:
    """What a candidate may do on real requests: fail to answer this share, agree with the champion on no less than `agreement`, and
    take `slower` times as long."""

    failed: float = 0.01
    agreement: float = 0.5
    slower: float = 2.0


def canary_gates(observed: Observed, allowed: Tolerances) -> tuple[Verdict, ...]:
    """Whether the candidate may be served, by what it did on real requests; undecided where nothing was asked.

    Differences are losses against a candidate that always answers, agrees, and is as quick.
    """
    if not observed.requests:
        return (Verdict("canary.requests", "undecided", 0.0, -1.0, 1.0, 0.0),)
    failed = proportion(observed.failed, observed.requests)
    found = [
        verdict("canary.failed", Interval(-failed.difference, -failed.high, -failed.low), allowed.failed)
    ]
    if observed.pictures:
        agreed = proportion(observed.agreed, observed.pictures)
        lost = Interval(agreed.difference - 1, agreed.low - 1, agreed.high - 1)
        found.append(verdict("canary.agreement", lost, 1 - allowed.agreement))
    if observed.usual:
        slower = 1 - observed.seconds / observed.usual
        found.append(verdict("canary.slower", Interval(slower, slower, slower), allowed.slower - 1))
    return tuple(found)


def outcome(verdicts: Sequence[Verdict]) -> Outcome:
    """The verdict of all gates together: one that fails decides, then one that is undecided."""
    found = {one.verdict for one in verdicts}
    return "fail" if "fail" in found else "undecided" if "undecided" in found else "pass"


def norms_out_of_bounds(
    norms: Mapping[str, float], reference: Mapping[str, float], bounds: Bounds
) -> tuple[str, ...]:
    """Reasons `geometry.NAME` for every norm that is not within the bounds of its reference; both by name (whole, tower, tensor)."""
    wrong = []
    for name, value in norms.items():
        usual = reference.get(name)
        if usual is not None and not bounds.low * usual <= value <= bounds.high * usual:
            wrong.append(f"geometry.{name}")
    return tuple(wrong)


class Medians:
    """The median of each norm over experts that come one after another; one more costs what the second did."""

    def __init__(self) -> None:
        self.count, self._sorted = 0, dict[str, list[float]]()

    def add(self, norms: Mapping[str, float]) -> None:
        """One more expert."""
        self.count += 1
        for name, value in norms.items():
            insort(self._sorted.setdefault(name, []), value)

    def found(self) -> dict[str, float]:
        """The median of each norm."""
        return {
            name: (one[(len(one) - 1) // 2] + one[len(one) // 2]) / 2 for name, one in self._sorted.items()
        }


def _mean(one: Judged, other: Judged, names: Sequence[str], seed: str) -> Interval:
    return bootstrap([pairs(one.answers, other.answers, name) for name in names], seed)


def _worst(candidate: Judged, champion: Judged, names: Sequence[str], margin: float) -> Verdict:
    """The dataset whose verdict is worst, and of these the one that lost most."""
    every = [
        verdict(
            f"accumulated.worst.{name}",
            mcnemar(together(pairs(candidate.answers, champion.answers, name))),
            margin,
        )
        for name in names
    ]
    rank = {"fail": 0, "undecided": 1, "pass": 2}
    return min(every, key=lambda one: (rank[one.verdict], one.difference))
