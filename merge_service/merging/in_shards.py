"""A merge whose output is in shards, which are made one after another, so that a merge that was stopped goes on with the next shard.

An element whose vote cancels exactly takes the sign of its group's majority, and a group may reach over several shards. A shard with such
elements is made as if the majority were plus. Its votes are noted beside it, and it is made again if those of all shards say otherwise.

Invariant: the shards have the bytes of a merge that makes all of them at once, wherever it was stopped and by however many workers.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from merge_service.blocks.moments import Geometry
from merge_service.blocks.questions import Findings
from merge_service.checkpoints.folders.shardwise import Shardwise
from merge_service.checkpoints.folders.staged import Staged
from merge_service.checkpoints.target import Target
from merge_service.checkpoints.weights import Weights
from merge_service.checkpoints.writer import Writer
from merge_service.engine.assembly import (
    Assembly,
    Balance,
    Made,
    Making,
    copy,
    in_file,
    make_in_turn,
    make_some,
)
from merge_service.engine.compute import Compute, site_of
from merge_service.engine.split import Team
from merge_service.engine.stream_state import Ends
from merge_service.engine.task import MergeTask
from merge_service.merging.derivation import Way


@dataclass
class Maker:
    """Makes the tensors of a shard, here or by a team of workers. What is found on the way is kept in `found`."""

    task: MergeTask
    found: Findings
    way: Way
    team: Team | None

    def make(self, writer: Writer, making: Making) -> Made:
        """The tensors of `making` into the open file."""
        task, execution = self.task, self.way.execution
        if self.team is not None:
            return self.team.make(task, self.found, writer, making)
        site = site_of(execution.device)
        if task.in_turn:
            made, self.found = make_in_turn(task, site, self.found, Ends(writer), execution, making)
            return made
        copy(task, writer, making)
        some = make_some(Compute(task, self.found, site), in_file(task, making), writer, execution, making)
        decided, waiting = making.decided(task, some.votes)
        return Made(some.settle(decided), some.votes, waiting)

    def lies(self, moments: Iterable) -> Geometry | None:
        """Where the merged model lies, of the moments of all shards."""
        last = Assembly(
            Compute(self.task, self.found, site_of(self.way.execution.device)),
            [],
            Ends(None),
            self.way.execution,
        )
        return Geometry.of([*moments, *last.kept()]) if self.way.execution.measures(self.task) else None


def make_staged(
    maker: Maker, target: Target, metadata: Mapping[str, str], inputs: Iterable[Weights]
) -> tuple[Geometry | None, Findings]:
    """Make every shard of `target` that is not made yet, and give all of them their names; where the merged model lies, and what was found.

    Raises what a merge raises, and `CheckpointError` if another process makes the same shards.
    """
    identity = json.dumps([one.fingerprint() for one in inputs])
    staged = Staged(Shardwise(target, maker.task.reference, metadata), identity)
    with staged.held():
        for at in range(staged.count):
            if staged.noted(at) is None:
                _make(maker, staged, at, None)
        notes = [staged.noted(at) or {} for at in range(staged.count)]
        total: Balance = {}
        for note in notes:
            for group, votes in note["balance"].items():
                total[group] = total.get(group, 0) + votes
        for at, note in enumerate(notes):
            if any(total.get(group, 0) <= 0 for group in note["waiting"]):
                _make(maker, staged, at, total)
        moments = [row for at in range(staged.count) for row in (staged.noted(at) or {})["moments"]]
        staged.publish()
    return maker.lies(moments), maker.found


def _make(maker: Maker, staged: Staged, at: int, total: Balance | None) -> None:
    """Make one shard and note it."""
    making = Making(staged.tensors(at), total)
    with staged.writer(at) as file:
        made = maker.make(staged.of.target.casting(file, maker.task.reference.tensors), making)
    note = {
        "balance": made.votes.balance,
        "waiting": sorted(made.waiting),
        "moments": [list(row) for row in made.moments],
    }
    staged.note(at, note)
