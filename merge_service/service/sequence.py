"""The merges of a sequence of experts that grows by one, loses one, and must never cost more for being long.

After every expert the streaming state is kept on disk: that of the newest time step, and snapshots (t = 1, 2, 4, ... and every multiple
of 64), from which the sequence is folded again when an expert leaves it. States are named by the chain of what they stand for, so a
state of another sequence is never taken for this one. The state of a fold is the running model itself.

Invariant: what is made has the bytes of `combine` of the experts in their order, whichever states were there; a state counts only if it
has the checksum that was written after it. Which merges there are, of which members, under which ids, is decided by
`timelines.results` and `derivation`, as in a study.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merge_service.checkpoints import ties
from merge_service.checkpoints.checkpoint import Checkpoint, locate, sha256_of
from merge_service.engine.assembly import Execution
from merge_service.errors import TechniqueError
from merge_service.faults import point
from merge_service.files.digest import checksum_of
from merge_service.live.lineage import is_snapshot
from merge_service.merging.combine import combine
from merge_service.merging.derivation import Derivation, Member, Operator, Out, Rules, Way
from merge_service.merging.report import MergeReport
from merge_service.merging.streaming import States, advance, merge_all
from merge_service.timelines import time as timeline
from merge_service.timelines.time import Base, Expert, Merged, Strategy

_sound: set[tuple[str, int, int, int]] = set()


@dataclass(frozen=True)
class Place:
    """One expert of the sequence: the sha256 of its weights, and the chain of all experts up to it."""

    sha256: str
    chain: str


@dataclass(frozen=True)
class Origin:
    """What a sequence starts from: the strategy, and the base with the sha256 of its weights. `expert` gives the path of an expert by
    its sha256."""

    strategy: Strategy
    base: Path
    sha256: str
    expert: Callable[[str], Path]


@dataclass(frozen=True)
class Growing:
    """A merge of all experts in places by an operator, into `out`."""

    operator: Operator
    places: Sequence[Place]
    out: Path


class Folder:
    """Makes the merges of sequences. `states` is the directory of kept states, which one process at a time may use."""

    def __init__(self, origin: Origin, states: Path, execution: Execution = Execution()) -> None:
        self.origin, self.states = origin, states
        self._way = Way(replace(execution, newest=True), Rules(any_base=True), durable=False)
        states.mkdir(parents=True, exist_ok=True)

    def make(self, merged: Merged, places: Sequence[Place], out: Path) -> MergeReport:
        """Write `merged`, of all of `places`, into the directory or file `out`. Raises what `combine` raises."""
        strategy = self.origin.strategy
        if merged.t != len(places) or merged not in timeline.results(strategy, merged.t):
            raise TechniqueError(f"the strategy makes no {merged.policy} merge of {len(places)} experts")
        if merged.policy == "ema":
            return self._fold(places, out)
        operator = Operator.of(str(strategy.technique), timeline.params_for(strategy, merged), "merge")
        if "stream" not in operator.technique.forms:
            every = tuple(self._named(t, one) for t, one in enumerate(places, 1))
            return merge_all(Derivation(operator, self.origin.base, every), Out(out, hashed=True), self._way)
        growing = Growing(operator, places, out)
        try:
            return self._stream(growing, self._start(places, "all"))
        except ties.BrokenTie:
            return self._stream(growing, 0, self._ties(places))

    def keep_only(self, chains: frozenset[str]) -> None:
        """Remove the states of all other chains, and what an ended writer left."""
        names = {chain[:32] for chain in chains}
        for entry in os.scandir(self.states):
            if entry.name[:32] not in names:
                Path(entry.path).unlink(missing_ok=True)

    def damaged(self) -> list[str]:
        """The states that do not have their checksum, which are made again when they are needed."""
        states = sorted(self.states.glob("[!.]*.safetensors"))
        return [f"{path} does not have its checksum" for path in states if not self._is_sound(path)]

    def _stream(self, what: "Growing", start: int, tied: ties.Ties | None = None) -> MergeReport:
        """Add the experts after the first `start` to their state."""
        report, places, count = None, what.places, len(what.places)
        before = self._state(places[start - 1].chain, "all") if start else None
        for at in range(start, count):
            after = self._state(places[at].chain, "all")
            last = Out(what.out, hashed=True) if at == count - 1 else None
            one = Derivation(what.operator, self.origin.base, (self._named(at + 1, places[at]),))
            report = advance(one, States(before, after), last, self._way, tied=tied)
            self._mark(after, {"crc": report.state or ""})
            if before is not None and start < at and not is_snapshot(at):
                _remove(before)
            before = after
        assert report is not None
        return report

    def _ties(self, places: Sequence[Place]) -> ties.Ties:
        """The ties that hold in all experts, which the states so far did not have."""
        with contextlib.ExitStack() as stack:
            base = stack.enter_context(Checkpoint.open(self.origin.base))
            experts = [stack.enter_context(Checkpoint.open(self.origin.expert(one.sha256))) for one in places]
            return ties.tie(base, experts)

    def _named(self, t: int, place: Place) -> Member:
        return Member(timeline.expert_id(t), self.origin.expert(place.sha256), place.sha256)

    def _fold(self, places: Sequence[Place], out: Path) -> MergeReport:
        report, count, start = None, len(places), self._start(places, "ema")
        for t in range(start + 1, count + 1):
            if Merged("ema", t) not in timeline.results(self.origin.strategy, t):
                continue  # the first expert itself is the running model
            merge = timeline.derivation(self.origin.strategy, Merged("ema", t))
            ids = merge.ids()
            members = tuple(
                replace(self._member(one, places), id=name) for one, name in zip(merge.members, ids)
            )
            operator = Operator.of(merge.technique, merge.params, "fold")
            target, state = (out if t == count else None), self._state(places[t - 1].chain, "ema")
            report = combine(
                Derivation(operator, self.origin.base, members), Out(target or state, hashed=True), self._way
            )
            weights = locate(target or state)
            if target is not None:
                _link(weights, state)
            self._mark(state, {"sha256": report.sha256[weights.name]})
            if start < t - 1 and not is_snapshot(t - 1):
                _remove(self._state(places[t - 2].chain, "ema"))
        assert report is not None
        return report

    def _member(self, weights: Base | Expert | Merged, places: Sequence[Place]) -> Member:
        if isinstance(weights, Base):
            return Member(None, self.origin.base, self.origin.sha256)
        one = places[weights.t - 1]
        if isinstance(weights, Expert):
            return Member(None, self.origin.expert(one.sha256), one.sha256)
        state = self._state(one.chain, weights.policy)
        return Member(None, state, json.loads(_sum_of(state).read_text())["sha256"])

    def _start(self, places: Sequence[Place], policy: str) -> int:
        """How many leading experts a sound state stands for; never all, since the last one makes the result."""
        for count in range(len(places) - 1, 0, -1):
            if self._is_sound(self._state(places[count - 1].chain, policy)):
                return count
        return 0

    def _state(self, chain: str, policy: str) -> Path:
        return self.states / f"{chain[:32]}-{policy}.safetensors"

    def _mark(self, state: Path, digest: dict[str, str]) -> None:
        point("state.before_mark")
        _sum_of(state).write_text(json.dumps(digest))
        _sound.add(_key(state))

    def _is_sound(self, state: Path) -> bool:
        """Whether a state has its checksum; read once by this process while its stat is unchanged."""
        try:
            if _key(state) in _sound and _sum_of(state).is_file():
                return True
            stated = json.loads(_sum_of(state).read_text())
            found = {"crc": checksum_of(state)} if "crc" in stated else {"sha256": sha256_of(state)}
        except (OSError, ValueError):
            return False
        if found == stated:
            _sound.add(_key(state))
        return bool(found == stated)


def _sum_of(state: Path) -> Path:
    return state.with_suffix(".sum")


def _remove(state: Path) -> None:
    state.unlink(missing_ok=True)
    _sum_of(state).unlink(missing_ok=True)


def _key(path: Path) -> tuple[str, int, int, int]:
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns, found.st_ino


def _link(source: Path, target: Path) -> None:
    """Another name for a file; a copy where there are no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
