"""The results in the records of steps, one type per kind of step: plain JSON values."""

from typing import NotRequired, TypedDict

from workers.jobs import EvaluateResult, LearnResult, MeasureResult, TrainResult

__all__ = ["BaseResult", "EvaluateResult", "LearnResult", "MeasureResult", "MergeResult", "TrainResult"]


class BaseResult(TypedDict):
    """The origin of the base model."""

    origin: str


class MergeResult(TypedDict):
    """A merge: norms of task vectors, and the cosine of the merged one with that of the newest expert."""

    merge_seconds: float
    merged_norm: NotRequired[float | None]
    expert_norm: NotRequired[float | None]
    cosine: NotRequired[float | None]
    notes: NotRequired[list[str]]


class ExpertResult(TypedDict):
    """Norms of the task vector by name (whole model, towers, largest tensor), the share of elements that did not move, and a sketch of
    its direction (base64 of float32)."""

    norms: dict[str, float]
    unchanged: float
    sketch: str
