"""Merging the same growing list of experts again and again, at the cost of the newest one.

A trajectory asks for the merge of experts 1..t at every t. Read anew each time that is quadratic in the number of tasks;
continued from the state of the previous merge it is linear, and the result is the same to the last bit.

Invariant: what comes out never depends on what was held. A state is only trusted in the process that wrote it; everything
else is rebuilt from the experts.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from merge_service.blocks.spans import BLOCK
from merge_service.checkpoints import ties
from merge_service.checkpoints.checkpoint import Checkpoint
from merge_service.engine.thresholds_cache import Keep
from merge_service.merging.combine import MergeReport, PathLike, advance, fold, merge
from merge_service.merging.intake import Rules
from merge_service.techniques.registry import get


@dataclass(frozen=True)
class Member:
    """One expert of a merge: its id, where it lies, and the sha256 of its weights file."""

    id: str
    path: Path
    sha256: str


def fold_in(
    technique: str,
    params: Mapping[str, Any],
    base: PathLike,
    members: Sequence[Member],
    out: PathLike,
    **options: Any,
) -> MergeReport:
    """`fold` of the running model and the newest expert, both named in the output: the one way in which a series is folded.

    `options` as of `fold`.
    """
    running, newest = members
    ids, known = (running.id, newest.id), {one.id: one.sha256 for one in members}
    return fold(technique, params, base, running.path, newest.path, out, ids=ids, sha256=known, **options)


@dataclass(frozen=True)
class _Held:
    members: tuple[tuple[str, str], ...]
    path: Path


class StreamCache:
    """Streaming states in a directory of its own under `scratch`; one per technique, parameters and base.

    `measure=False` saves computing `merged_norm`; the bytes are the same. `keep_limits` as in `merge`.
    """

    def __init__(
        self,
        scratch: PathLike,
        *,
        threads: int = 1,
        block: int = BLOCK,
        measure: bool = True,
        keep_limits: Keep = False,
    ) -> None:
        Path(scratch).mkdir(parents=True, exist_ok=True)
        self._directory = Path(tempfile.mkdtemp(prefix="states-", dir=scratch))
        self._common: dict[str, Any] = {
            "threads": threads,
            "block": block,
            "measure": measure,
            "keep_limits": keep_limits,
        }
        self._held: dict[str, _Held] = {}
        self._written = 0

    def merge(
        self,
        technique: str,
        params: Mapping[str, Any],
        base: PathLike,
        base_sha256: str,
        members: Sequence[Member],
        out: PathLike,
        rules: Rules = Rules(),
    ) -> MergeReport:
        """`merge` of the members in this order, to the byte; cheap when all but the last were merged just before."""
        plugin = get(technique)
        known = {member.id: member.sha256 for member in members}
        common = {"sha256": known, "rules": rules, **self._common}
        if "stream" not in plugin.forms or not members:
            ids, paths = [m.id for m in members], [m.path for m in members]
            return merge(technique, params, base, paths, out, ids=ids, **common)
        resolved = plugin.resolve(params, "merge", strict=True)
        lineage = self._lineage(plugin.name, resolved, base_sha256)
        start, state = self._longest(lineage, members)
        steps = partial(self._advance, technique, resolved, base, members, out, common, lineage)
        try:
            return steps(start, state)
        except ties.BrokenTie:
            with ExitStack() as stack:
                anchor, *opened = (
                    stack.enter_context(Checkpoint.open(path)) for path in (base, *(m.path for m in members))
                )
                tied = ties.tie(anchor, opened)
            return steps(0, None, tied)

    def _advance(
        self,
        technique: str,
        resolved: Mapping[str, Any],
        base: PathLike,
        members: Sequence[Member],
        out: PathLike,
        common: Mapping[str, Any],
        lineage: str,
        start: int,
        state: Path | None,
        tied: ties.Ties | None = None,
    ) -> MergeReport:
        """Take in the members from number `start` on, the first of all with what is `tied` in all."""
        report = None
        for number in range(start, len(members)):
            member, target = members[number], self._next_path()
            report = advance(
                technique,
                resolved,
                base,
                member.path,
                out if number == len(members) - 1 else None,
                expert_id=member.id,
                state_in=state,
                state_out=target,
                tied=tied,
                **common,
            )
            self._keep(lineage, members[: number + 1], target)
            state = target
        assert report is not None
        return report

    def close(self) -> None:
        """Forget everything and free the disk."""
        self._held.clear()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _longest(self, lineage: str, members: Sequence[Member]) -> tuple[int, Path | None]:
        """How many leading members a held state stands for (never all: the last one makes the result), and the state."""
        held = self._held.get(lineage)
        if held is None or len(held.members) >= len(members):
            return 0, None
        if held.members != tuple((m.id, m.sha256) for m in members[: len(held.members)]):
            return 0, None
        return len(held.members), held.path

    def _keep(self, lineage: str, members: Sequence[Member], path: Path) -> None:
        before = self._held.get(lineage)
        self._held[lineage] = _Held(tuple((m.id, m.sha256) for m in members), path)
        if before is not None:
            before.path.unlink(missing_ok=True)

    def _next_path(self) -> Path:
        self._written += 1
        return self._directory / f"{self._written}.safetensors"

    def _lineage(self, technique: str, resolved: Mapping[str, Any], base_sha256: str) -> str:
        fixed = {name: value for name, value in resolved.items() if name != "weights"}
        return json.dumps([technique, fixed, base_sha256], sort_keys=True)
