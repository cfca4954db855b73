"""Merges a growing list of experts again and again, at the cost of the newest one.

A trajectory needs the merge of experts 1..t at every t. Reading all experts each time is quadratic in the number of tasks.
Continuing from the state of the previous merge is linear, and gives the same bits.

Every state has its checksum beside it, so a process that starts where another ended continues from there and does not read every
expert again.

A state is kept only where there is room for it.

Invariant: the result never depends on held states. A state is trusted by the process that wrote it, and by others if its checksum is
right; every other state is rebuilt from the experts.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from merge_service.checkpoints import ties
from merge_service.checkpoints.adapters.opening import open_weights
from merge_service.engine.stream_state import NoRoom
from merge_service.files.digest import checksum_of
from merge_service.files.leftovers import is_abandoned, owner_mark
from merge_service.merging.derivation import Derivation, Member, Operator, Out, PathLike, Rules, Way
from merge_service.merging.report import MergeReport
from merge_service.merging.streaming import States, advance, merge_all

Members = tuple[tuple[str | None, ...], ...]
"""Ids and sha256 of what a state stands for, and the sha256 of statistics where these are part of it."""
PREFIX = "states-"


@dataclass(frozen=True)
class _Held:
    members: Members
    path: Path


class StreamCache:
    """Streaming states in a directory of their own under `scratch`; one per technique, parameters and base.

    What an earlier process left under `scratch` is taken over where it fits. States are not synced, since their checksums tell a
    torn one.

    `way` is how merges are carried out.
    """

    def __init__(self, scratch: PathLike, way: Way = Way()) -> None:
        Path(scratch).mkdir(parents=True, exist_ok=True)
        self._scratch = Path(scratch)
        self._directory = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{owner_mark()}.", dir=scratch))
        self._way = way
        self._held: dict[str, _Held] = {}

    def merge(
        self,
        derivation: Derivation,
        base_sha256: str,
        out: PathLike,
        rules: Rules = Rules(),
        reserve: int = 0,
    ) -> MergeReport:
        """The merge of a derivation, to the byte; cheap if all its members but the last were merged just before.

        No state is kept that would not leave `reserve` bytes free: such a merge reads all of its members.
        """
        operator, target = derivation.operator, Out(Path(out), hashed=True)
        way = replace(self._way, rules=rules)
        if "stream" not in operator.technique.forms or not derivation.members:
            return merge_all(derivation, target, way)
        lineage = _lineage(operator, base_sha256)
        try:
            return self._by_states(derivation, target, replace(way, reserve=reserve), lineage)
        except NoRoom:
            held = self._held.pop(lineage, None)
            if held is not None:
                _remove(held.path)
            return merge_all(derivation, target, way)

    def _by_states(self, derivation: Derivation, out: Out, way: Way, lineage: str) -> MergeReport:
        steps = partial(self._advance, derivation, out, way, lineage)
        try:
            return steps(self._longest(lineage, derivation.members))
        except ties.BrokenTie:
            with ExitStack() as stack:
                anchor, *newest_first = (
                    stack.enter_context(open_weights(path, derivation.base)) for path in derivation.sources
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
        """Add the members after a state. `start` is their number and the state; `tied` are the ties of all members, if known."""
        report, (done, state), members = None, start, derivation.members
        for number in range(done, len(members)):
            after = self._directory / _name(lineage, _identities(members[: number + 1]))
            last = out if number == len(members) - 1 else None
            one = replace(derivation, members=(members[number],))
            report = advance(one, States(state, after), last, way, tied=tied)
            after.with_suffix(".crc").write_text(report.state or "")
            self._keep(lineage, members[: number + 1], after)
            state = after
        assert report is not None
        return report

    def close(self) -> None:
        """Drop all states and free the disk."""
        self._held.clear()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _longest(self, lineage: str, members: Sequence[Member]) -> tuple[int, Path | None]:
        """How many leading members a held state stands for (never all: the last one makes the result), and the state."""
        wanted, held = _identities(members), self._held.get(lineage)
        if held is None or len(held.members) >= len(wanted) or held.members != wanted[: len(held.members)]:
            held = self._taken_over(lineage, wanted)
        return (0, None) if held is None else (len(held.members), held.path)

    def _taken_over(self, lineage: str, wanted: Members) -> _Held | None:
        """The longest state of these members that another process left whole; here it has a name of its own from now on."""
        for count in range(len(wanted) - 1, 0, -1):
            name = _name(lineage, wanted[:count])
            mine = self._directory / name
            for found in sorted({*self._scratch.glob(f"{PREFIX}*/{name}")} - {mine}):
                try:
                    mine.unlink(missing_ok=True)
                    os.link(found, mine)
                    stated = found.with_suffix(".crc").read_text()
                    if stated and checksum_of(mine) == stated:
                        mine.with_suffix(".crc").write_text(stated)
                        return _Held(wanted[:count], mine)
                except OSError:
                    pass  # gone in the meantime, or no links here: the experts are there
                mine.unlink(missing_ok=True)
        return None

    def _keep(self, lineage: str, members: Sequence[Member], path: Path) -> None:
        before = self._held.get(lineage)
        self._held[lineage] = _Held(_identities(members), path)
        if before is not None and before.path != path:
            _remove(before.path)
        earlier = _name(lineage, _identities(members[:-1]))
        for left in self._scratch.glob(f"{PREFIX}*/{earlier}"):
            mark = left.parent.name.removeprefix(PREFIX).rpartition(".")[0]
            if left.parent == self._directory or is_abandoned(mark, 0.0):
                _remove(left)


def _remove(state: Path) -> None:
    state.unlink(missing_ok=True)
    state.with_suffix(".crc").unlink(missing_ok=True)


def _identities(members: Sequence[Member]) -> Members:
    return tuple(
        (member.id, member.sha256, *([member.statistics_sha256] if member.statistics_sha256 else []))
        for member in members
    )


def _name(lineage: str, members: Members) -> str:
    """The file of a state of these members."""
    return hashlib.sha256(json.dumps([lineage, members]).encode()).hexdigest()[:32] + ".safetensors"


def _lineage(operator: Operator, base_sha256: str) -> str:
    """The key that states which continue each other have in common."""
    fixed = {name: value for name, value in operator.params.items() if name != "weights"}
    return json.dumps([operator.technique.name, fixed, base_sha256], sort_keys=True)
