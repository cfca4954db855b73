"""Jobs of the merge actor, as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from merge_service.merging.derivation import Member
from merge_service.techniques.definition import Origin

MergedAs = Literal["files", "tried", "recipe"]


@dataclass(frozen=True)
class MergeJob:
    """One merge of a series: the experts of tasks 1..t at once (`merge`, and a `fold` of sums over experts, whose state is a cache), or
    the running model and the newest (`fold`).

    `members` come in the technique's order, oldest first; their ids seed random masks, so they are part of the result. `scratch`
    is for streaming states and `thresholds` for kept thresholds: caches, rebuilt when they are missing. `held` is "recipe" for a
    merge that is only scored and then dropped, and "tried" for one that is made again at once, to show that its kind may be dropped.
    `origin` is where a technique that is not built in is defined. `any_base` accepts experts that may be far from the base. `reserve`:
    bytes that states must leave free where `scratch` is.
    """

    label: str
    technique: str
    params: Mapping[str, Any]
    form: str
    base: Member
    members: tuple[Member, ...]
    threads: int
    scratch: str
    thresholds: str
    origin: Origin | None = None
    any_base: bool = False
    held: MergedAs = "files"
    reserve: int = 0


@dataclass(frozen=True)
class TakeJob:
    """Take in an expert that was trained elsewhere: the file `source`, which must have this sha256, with the files of the base directory
    (`beside`) that go with weights.
    """

    label: str
    source: Path
    sha256: str
    base: Path
    beside: tuple[str, ...]
