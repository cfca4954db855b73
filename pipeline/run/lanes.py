"""The lanes of a plan's steps, and the pools of workers behind them; which lane a step belongs to is its carrier's matter."""

from collections.abc import Mapping

from cluster.capacity import Capacity
from cluster.pool import Pool
from cluster.session import ClusterError
from pipeline.plan.steps import Step
from pipeline.run.carriers import CARRIERS, Lane, Series
from pipeline.study.config import Study


class Lanes:
    """The lanes of a plan's steps."""

    def __init__(self, study: Study, steps: Mapping[str, Step]) -> None:
        self.study = study
        self.by_name: dict[str, Lane] = {}
        self._series: Series = {}
        self._of: dict[str, Lane] = {}
        self.add(steps)

    def add(self, steps: Mapping[str, Step]) -> None:
        """Give these steps a lane too."""
        for fingerprint, step in steps.items():
            if fingerprint not in self._of:
                lane = CARRIERS[step.kind].lane(step, self.study.resources, self._series)
                self._of[fingerprint] = self.by_name.setdefault(lane.name, lane)

    def of(self, step: Step) -> str:
        """The name of a step's lane."""
        return self._of[step.fingerprint].name

    def check(self, capacity: Capacity) -> None:
        """Raise ClusterError if a step can never have a place, with what it wants and what there is."""
        for lane in sorted(self.by_name.values(), key=lambda lane: lane.kind, reverse=True):
            lacking = capacity.lacking(lane.shape)
            if lacking:
                carrier = CARRIERS[lane.kind]
                raise ClusterError(
                    f"{carrier.what} ({lane.name}) wants {lane.shape}, which do not fit into {capacity}: {lacking}. Lower "
                    f"resources.{carrier.section}, add nodes, or set resources.autoscaling if nodes will come"
                )

    def pools(self, patient: bool) -> dict[str, Pool]:
        """One pool for every shape, and one for every merge actor; none of them has started anything."""
        return {lane.pool: CARRIERS[lane.kind].pool(lane, patient) for lane in self.by_name.values()}
