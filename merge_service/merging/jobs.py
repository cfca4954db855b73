"""What the merge actor is asked to do, as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_service.merging.derivation import Member
from merge_service.techniques.definition import Origin


@dataclass(frozen=True)
class MergeJob:
    """One merge of a series: the experts of tasks 1..t at once (`merge`), or the running model and the newest (`fold`).

    `members` come in the technique's order, oldest first; their ids seed random masks, so they are part of the result.
    `scratch` is for streaming states and `limits` for kept thresholds: caches, rebuilt when they are missing.
    `origin` is where a technique that is not ours is written. `any_base` takes experts that may lie far from the base.
    """

    label: str
    technique: str
    params: Mapping[str, Any]
    form: str
    base: Member
    members: tuple[Member, ...]
    threads: int
    scratch: str
    limits: str
    origin: Origin | None = None
    any_base: bool = False
