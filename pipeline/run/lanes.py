"""The lanes of a plan's steps, and the pools of workers behind them. The carrier of a step determines its lane."""

from collections.abc import Mapping

from cluster.capacity import Capacity
from cluster.pool import Pool
from cluster.session import ClusterError
from pipeline.kinds.table import KINDS
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
        """Assign a lane to these steps as well."""
        for fingerprint, step in steps.items():
            if fingerprint not in self._of:
                lane = CARRIERS[step.kind].lane(step, self.study.resources, self._series)
                self._of[fingerprint] = self.by_name.setdefault(lane.name, lane)

    def of(self, step: Step) -> str:
        """The name of a step's lane."""
        return self._of[step.fingerprint].name

    def most_of(self, kind: str) -> int | None:
        """How many steps of a kind may run at a time (`schedule.max_running`); None for any number, also for a kind without such
        a key.
        """
        most: int | None = getattr(self.study.schedule.max_running, kind, None)
        return most

    def scores_beside_experts(self, lane: Lane) -> bool:
        """Whether a lane's steps are evaluations that the experts' workers carry out, so that no worker starts or ends for them.

        False for every lane if trajectories are finished in turn.
        """
        if self.study.schedule.priority != "critical_path":
            return False
        others = (one for one in self.by_name.values() if one.pool == lane.pool)
        return KINDS[lane.kind].scores and any(KINDS[one.kind].trains for one in others)

    def check(self, capacity: Capacity) -> None:
        """Raise ClusterError, with the required and the available resources, if a step can never be placed."""
        for lane in sorted(self.by_name.values(), key=lambda lane: lane.kind, reverse=True):
            lacking = capacity.lacking(lane.shape)
            if lacking:
                carrier = CARRIERS[lane.kind]
                raise ClusterError(
                    f"{carrier.what} ({lane.name}) needs {lane.shape}, which do not fit into {capacity}: {lacking}. Lower "
                    f"resources.{carrier.section}, add nodes, or set resources.autoscaling if nodes will come"
                )

    def pools(self, patient: bool) -> dict[str, Pool]:
        """One pool for every shape, and one for every merge actor; none has started workers yet."""
        return {lane.pool: CARRIERS[lane.kind].pool(lane, patient) for lane in self.by_name.values()}
