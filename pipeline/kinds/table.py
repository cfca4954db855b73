"""The kinds of steps, one row each: what plan, store and schedule must know of them. How each is carried out stands in `run.carriers`.

Invariant: the order of rows is that of work at one time step; the name of a kind is a folder of the store and part of every fingerprint.
"""

from dataclasses import dataclass

from pipeline.kinds.results import BaseResult, EvaluateResult, MergeResult, TrainResult
from pipeline.kinds.specs import BaseSpec, EvaluateSpec, MergeSpec, Spec, TrainSpec


@dataclass(frozen=True)
class StepKind:
    """One kind of step.

    `revision` is raised when the kind's code changes results: older artifacts are then no longer taken for it. `weight` is a rough cost,
    only to rank what is ready. `trains`: its cost is in GFLOPs. `scores`: its result has the scores of a model.
    """

    name: str
    revision: int
    spec: type[Spec]
    result: type
    weight: float
    trains: bool = False
    scores: bool = False


KINDS = {
    row.name: row
    for row in (
        StepKind(BaseSpec.kind, 1, BaseSpec, BaseResult, weight=0.0),
        StepKind(TrainSpec.kind, 1, TrainSpec, TrainResult, weight=100.0, trains=True),
        StepKind(MergeSpec.kind, 1, MergeSpec, MergeResult, weight=1.0),
        StepKind(EvaluateSpec.kind, 1, EvaluateSpec, EvaluateResult, weight=3.0, scores=True),
    )
}
"""Every kind by its name.

Merges of a base without `ModelFacts.resblocks` are one revision ahead: depth, statistics and packed matrices were once misread there.
"""
STEPS = tuple(name for name in KINDS if name != BaseSpec.kind)
"""The kinds that a plan carries out; the base is there before it."""
