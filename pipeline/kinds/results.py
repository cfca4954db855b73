"""What a step's record says of its result, one type per kind of step: plain JSON values."""

from typing import NotRequired, TypedDict


class BaseResult(TypedDict):
    """Where the base model came from."""

    origin: str


class TrainResult(TypedDict):
    """How an expert was trained; `loss` is a curve of [step, value]."""

    steps: int
    samples: int
    seconds: float
    samples_per_second: float
    loss: list[list[float]]
    lr: list[float]
    task_vector_norm: float
    resumed_from: int | None


class MergeResult(TypedDict):
    """How a merge came out: norms of task vectors, the cosine of the merged one with that of the newest expert."""

    merge_seconds: float
    merged_norm: NotRequired[float | None]
    expert_norm: NotRequired[float | None]
    cosine: NotRequired[float | None]
    notes: NotRequired[list[str]]


class EvaluateResult(TypedDict):
    """Scores in [0, 1] and the number of samples behind each, by dataset."""

    scores: dict[str, float]
    samples: dict[str, int]
    seconds: float
