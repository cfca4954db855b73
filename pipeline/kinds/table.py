"""The kinds of steps, one row each: what plan, store and schedule must know of them. `run.carriers` says how each is carried out.

Invariant: the order of the rows is the order of work at one time step. The name of a kind is a folder of the store and
part of every fingerprint.
"""

from dataclasses import dataclass

from pipeline.kinds.results import (
    BaseResult,
    EvaluateResult,
    ExpertResult,
    LearnResult,
    MeasureResult,
    MergeResult,
    TrainResult,
)
from pipeline.kinds.specs import (
    BaseSpec,
    EvaluateSpec,
    ExpertSpec,
    LearnSpec,
    MeasureSpec,
    MergeSpec,
    SequenceSpec,
    Spec,
    TrainSpec,
)


@dataclass(frozen=True)
class StepKind:
    """One kind of step.

    `revision` is raised when the kind's code changes results, so that older artifacts are no longer used. `weight` is a
    rough cost, used only to rank steps that are ready. `trains`: the cost is in GFLOPs. `scores`: the result has the
    scores of a model. `planned`: studies have such steps; the others are a live service's. `weights`: the artifact is a model.
    `seldom`: most plans have no such step, and summaries of these leave the kind out.
    """

    name: str
    revision: int
    spec: type[Spec]
    result: type
    weight: float
    trains: bool = False
    scores: bool = False
    planned: bool = True
    weights: bool = True
    seldom: bool = False


KINDS = {
    row.name: row
    for row in (
        StepKind(BaseSpec.kind, 1, BaseSpec, BaseResult, weight=0.0),
        StepKind(TrainSpec.kind, 1, TrainSpec, TrainResult, weight=100.0, trains=True),
        StepKind(ExpertSpec.kind, 1, ExpertSpec, ExpertResult, weight=1.0, seldom=True),
        StepKind(MeasureSpec.kind, 1, MeasureSpec, MeasureResult, weight=3.0, weights=False, seldom=True),
        StepKind(LearnSpec.kind, 2, LearnSpec, LearnResult, weight=30.0, weights=False, seldom=True),
        StepKind(MergeSpec.kind, 1, MergeSpec, MergeResult, weight=1.0),
        StepKind(EvaluateSpec.kind, 1, EvaluateSpec, EvaluateResult, weight=3.0, scores=True, weights=False),
        StepKind(SequenceSpec.kind, 1, SequenceSpec, MergeResult, weight=1.0, planned=False),
    )
}
"""Every kind by its name.

Merges of a base without `ModelFacts.resblocks` are one revision ahead, because depth, statistics and packed matrices
were once misread there.
"""
STEPS = tuple(name for name, row in KINDS.items() if row.planned and name != BaseSpec.kind)
"""The kinds that a plan carries out; the base exists before it."""
