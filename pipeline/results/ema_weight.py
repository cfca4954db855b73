"""The weight of the new expert in a running average, from how far experts drift and how much is replayed.

A function that was fitted and tested by a study (`docs/when_ema.md`), with the range that it was fitted on. Invariant: a weight lies in
(0, 1), and `covers` knows what was measured.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class EmaWeight:
    """logit weight = `constant` + `by_drift` * log10 drift + `by_share` * share.

    Drift is the mean over the experts of fine-tuning of `relative_drift` in their records: the length of the task vector from where
    training began, over the length of the weights it began with. The share is that of replay in a batch. `drifts` and `shares` are the
    lowest and highest that were measured.
    """

    constant: float
    by_drift: float
    by_share: float
    drifts: tuple[float, float]
    shares: tuple[float, float]

    def weight(self, drift: float, share: float) -> float:
        """The weight of the new expert. Raises ValueError for a drift that is not above 0 or a share outside [0, 1)."""
        if not drift > 0 or not 0 <= share < 1:
            raise ValueError(f"a drift is above 0 and a share in [0, 1), not {drift:g} and {share:g}")
        logit = self.constant + self.by_drift * math.log10(drift) + self.by_share * share
        return 1 / (1 + math.exp(-logit))

    def covers(self, drift: float, share: float) -> bool:
        """Whether the function was fitted where this lies."""
        return self.drifts[0] <= drift <= self.drifts[1] and self.shares[0] <= share <= self.shares[1]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


MEASURED = EmaWeight(-2.73205, -1.22964, 4.05255, (0.0083224, 0.0616493), (0.0, 0.66))
"""The function of docs/when_ema.md, as in docs/when_ema/advice.json."""
