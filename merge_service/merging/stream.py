"""Merging the same growing list of experts again and again, at the cost of the newest one.

A trajectory asks for the merge of experts 1..t at every t. Read anew each time that is quadratic in the number of tasks;
continued from the state of the previous merge it is linear, and the result is the same to the last bit.

Invariant: what comes out never depends on what was held. A state is only trusted in the process that wrote it; everything
else is rebuilt from the experts.
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from merge_service.checkpoints import ties
from merge_service.checkpoints.checkpoint import Checkpoint
from merge_service.engine.assembly import Execution
from merge_service.engine.thresholds_cache import Keep
from merge_service.merging.derivation import Derivation, Member, Operator, Out, PathLike, Rules, Way
from merge_service.merging.report import MergeReport
from merge_service.merging.streaming import States, advance, merge_all


@dataclass(frozen=True)
class _Held:
    members: tuple[tuple[str | None, str | None], ...]
    path: Path


class StreamCache:
    """Streaming states in a directory of its own under `scratch`; one per technique, parameters and base.

    `keep_limits` as in `merge`.
    """

    def __init__(
        self, scratch: PathLike, execution: Execution = Execution(), keep_limits: Keep = False
    ) -> None:
        Path(scratch).mkdir(parents=True, exist_ok=True)
        self._directory = Path(tempfile.mkdtemp(prefix="states-", dir=scratch))
        self._execution, self._keep_limits = execution, keep_limits
        self._held: dict[str, _Held] = {}
        self._written = 0

    def merge(
        self, derivation: Derivation, base_sha256: str, out: PathLike, rules: Rules = Rules()
    ) -> MergeReport:
        """The merge of a derivation, to the byte; cheap when all its members but the last were merged just before."""
        operator, target = derivation.operator, Out(Path(out))
        way = Way(self._execution, rules, self._keep_limits)
        if "stream" not in operator.technique.forms or not derivation.members:
            return merge_all(derivation, target, way)
        steps = partial(self._advance, derivation, target, way, _lineage(operator, base_sha256))
        try:
            return steps(self._longest(_lineage(operator, base_sha256), derivation.members))
        except ties.BrokenTie:
            with ExitStack() as stack:
                anchor, *newest_first = (
                    stack.enter_context(Checkpoint.open(path)) for path in derivation.sources
                )
                tied = ties.tie(anchor, newest_first[::-1])
            return steps((0, None), tied)

    def _advance(
        self,
        derivation: Derivation,
        out: Out,
        way: Way,
        lineage: str,
        start: tuple[int, Path | None],
        tied: ties.Ties | None = None,
    ) -> MergeReport:
        """Take in the members that come after a state (their number, the state), the first of all with what is `tied` in all."""
        report, (done, state), members = None, start, derivation.members
        for number in range(done, len(members)):
            after, last = self._next_path(), out if number == len(members) - 1 else None
            one = replace(derivation, members=(members[number],))
            report = advance(one, States(state, after), last, way, tied=tied)
            self._keep(lineage, members[: number + 1], after)
            state = after
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


def _lineage(operator: Operator, base_sha256: str) -> str:
    """What states that continue each other have in common."""
    fixed = {name: value for name, value in operator.params.items() if name != "weights"}
    return json.dumps([operator.technique.name, fixed, base_sha256], sort_keys=True)
