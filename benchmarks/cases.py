"""What is measured: a technique, its parameters, and how many checkpoints it takes.

Parameters are the ones under which the peers' definitions and ours agree as far as they can (`peers_mergekit.py` and
`peers_fusionbench.py` hold theirs, under the same names): scale 0.3 for sums, the mean of a density of 0.2 for the TIES
family, weight 0.5 for folds.
"""

from dataclasses import dataclass, field
from typing import Any

from inputs import Inputs


@dataclass(frozen=True)
class Case:
    """One row of the results. `options` are keyword arguments of `merge`, and `flags` the same for the command line.

    `prepared` runs the merge once, unmeasured, before it is measured: for what may be at hand or not.
    """

    name: str
    technique: str
    params: dict[str, Any] = field(default_factory=dict)
    form: str = "merge"
    base: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    prepared: bool = False

    def job(self, tiny: Inputs) -> dict[str, Any]:
        """What a contender is asked to do, apart from the files and threads that are measured.

        `first` is a merge of two tiny checkpoints, which every contender does before its clock starts. mergekit and
        FusionBench know the rest by the name of the case.
        """
        base, experts = self.checkpoints(str(tiny.base), [str(path) for path in tiny.experts[:2]])
        what = {name: getattr(self, name) for name in ("technique", "form", "params", "options")}
        return {**what, "case": self.name, "first": {"base": base, "experts": experts}}

    def checkpoints(self, base: str, experts: list[str]) -> tuple[str | None, list[str]]:
        """The base, if it is read at all, and the experts: all of them, or two to fold."""
        return base if self.base else None, experts[:2] if self.form == "fold" else experts


def _at_hand(technique: str) -> Case:
    """The same with the thresholds kept beside the experts from an earlier merge."""
    return Case(
        f"{technique}_kept",
        technique,
        options={"keep_thresholds": True},
        flags=("--keep-thresholds",),
        prepared=True,
    )


CASES = {
    case.name: case
    for case in (
        Case("average", "average", base=False),
        Case("ema_fold", "average", {"weight": 0.5}, form="fold", base=False),
        Case("slerp_fold", "slerp", {"weight": 0.5}, form="fold", base=False),
        Case("task_arithmetic", "task_arithmetic", {"scale": 0.3}),
        Case("magmax", "magmax", {"scale": 0.5}),
        Case("lines_task_arithmetic", "lines_task_arithmetic"),
        Case("ties", "ties"),
        _at_hand("ties"),
        Case("dare_ties", "dare_ties"),
        Case("breadcrumbs_ties", "breadcrumbs_ties"),
        _at_hand("breadcrumbs_ties"),
        Case("iso_c", "iso_c"),
        Case("iso_cts", "iso_cts"),
        Case("opcm", "opcm"),
    )
}
