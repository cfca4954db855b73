"""Merges all members of a derivation at once: every expert, or a running model and the newest one.

Everything that can be validated is validated before a block is computed. The output is written once and published only when it is
complete; that of models in memory stays there. Memory is a few blocks per thread, for any number of experts.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from merge_service.blocks.questions import Ask, Findings
from merge_service.checkpoints import ties
from merge_service.checkpoints.target import Laid, Target
from merge_service.checkpoints.views.memory import ArrayWriter, InMemory
from merge_service.checkpoints.weights import Weights
from merge_service.checkpoints.writer import Writer
from merge_service.engine.assembly import assemble, assemble_in_turn
from merge_service.engine.compute import Compute, site_of
from merge_service.engine.inputs import spliced
from merge_service.engine.prepare import prepare
from merge_service.engine.stream_state import METADATA_KEY, Ends, effective
from merge_service.engine.survey import Surveyor
from merge_service.engine.task import Input, MergeTask
from merge_service.engine.thresholds_cache import KeptThresholds
from merge_service.merging.derivation import Derivation, Lineage, Operator, Out, Way, members_of
from merge_service.merging.evidence import gather
from merge_service.merging.in_shards import Maker, make_staged
from merge_service.merging.intake import (
    by_content,
    check_count,
    check_inputs,
    check_patterns,
    open_all,
    shown,
    strip,
)
from merge_service.merging.report import Done, MergeReport, report_of
from merge_service.statistics import Statistics

Arrays = dict[str, np.ndarray]
"""All elements of every tensor in a row, as a file stores them."""


def combine(derivation: Derivation, out: Out, way: Way = Way()) -> MergeReport:
    """Merge the members into `out`.

    Raises `TechniqueError` (technique, parameters, number of experts), or the kind of `CheckpointError` that fits, naming the
    expert and tensor; `out` is then unchanged.
    """
    check_count(derivation)
    with contextlib.ExitStack() as stack:
        anchor, opened = open_all(stack, derivation.base, derivation.paths, way.rules)
        return combine_weights(derivation, anchor, opened, out, way)


def combine_weights(
    derivation: Derivation, anchor: Weights | None, opened: Sequence[Weights], out: Out, way: Way = Way()
) -> MergeReport:
    """As `combine`, for weights of any kind: `anchor` is the base, `opened` are the members, in the derivation's order.

    Raises as `combine` does.
    """
    began, operator = time.perf_counter(), derivation.operator
    with contextlib.ExitStack() as stack:
        known, tied = taken_in(derivation, anchor, opened, way)
        check_patterns(derivation, anchor or opened[0])
        measured = gather(stack, operator, anchor, derivation.members, opened)
        target = out.target(derivation.sources, ties.apart(anchor or opened[0], tied))
        site = site_of(way.execution.device)
        task = task_of(operator, target, anchor, opened, Taken(known, tied, measured))
        team = stack.enter_context(way.split.team(task, way.execution)) if way.split else None
        said, memory = (
            metadata(task, operator.form, known),
            KeptThresholds(task, way.keep_thresholds, known.sha256),
        )
        in_turn = team is None and task.in_turn
        notes: tuple[str, ...] = ()
        if in_turn:
            found = memory.recall()
        else:
            ask = team or Surveyor(task, task.combined, way.execution.threads, site)
            found, notes = ready(task, way, memory, ask.answer)
        writer: Writer | None = None
        if way.durable and not out.hashed and len(target.parts(task.reference.tensors)) > 1:
            every = [weights for weights in (anchor, *opened) if weights is not None]
            lies, found = make_staged(Maker(task, found, way, team), target, said, every)
        else:
            with target.open(task.reference, said, way.durable) as writer:
                if team is not None:
                    lies = team.assemble(task, found, writer, way.execution)
                elif in_turn:
                    lies, found = assemble_in_turn(task, site, found, Ends(writer), way.execution)
                else:
                    lies = assemble(Compute(task, found, site), Ends(writer), way.execution)
        if in_turn:
            notes = memory.store(found)
        return report_of(task, target, known, began, Done(lies, writer, notes))


def merge_in_memory(
    operator: Operator,
    base: InMemory | None,
    experts: Sequence[InMemory],
    way: Way = Way(),
    *,
    ids: Sequence[str | None] | None = None,
    statistics: Sequence[Path | str | None] | None = None,
) -> Arrays:
    """The elements of every tensor of the merged model, in a row, as stored in a file, with the base's dtypes (the first expert's without one).

    For techniques that take experts one after another by a state on the disk (`Technique.ordered`) there is `streaming.replay`. Raises
    what `merge_service.merge.merge` raises.
    """
    assert not operator.technique.ordered, operator.technique.name
    members = members_of([one.path for one in experts], ids, None, statistics)
    derivation = Derivation(operator, None if base is None else base.path, members)
    check_count(derivation)
    strip([*([] if base is None else [base]), *experts], way.rules)
    out = _Out(Path("merged"))
    combine_weights(derivation, base, experts, out, way)
    return out.arrays


@dataclass(frozen=True)
class _Target(Target):
    """Where the tensors of a merged model are kept: `arrays`, all elements of each in a row, as a file stores them."""

    arrays: Arrays = field(default_factory=dict)

    @contextlib.contextmanager
    def open(self, reference: Laid, metadata: dict[str, str], durable: bool = True) -> Iterator[Writer]:
        """A writer that keeps its tensors; they are there when it is closed."""
        writer = ArrayWriter(self.parts(reference.tensors)[0])
        yield writer
        writer.close()
        self.arrays.update(writer.arrays)


@dataclass(frozen=True)
class _Out(Out):
    """A merged model that is kept in `arrays`."""

    arrays: Arrays = field(default_factory=dict)

    def target(self, sources: Sequence[Path], apart: tuple[str, str] | None = None) -> Target:
        """The place of its tensors."""
        return _Target(self.path, self.path, None, arrays=self.arrays)


@dataclass(frozen=True)
class Taken:
    """What is known of inputs that may be merged: their lineage, the ties that hold in all of them, and what was measured of each."""

    known: Lineage
    tied: ties.Ties
    measured: Sequence[Statistics | None]


def task_of(
    operator: Operator, target: Target, anchor: Weights | None, opened: Sequence[Weights], facts: Taken
) -> MergeTask:
    """The task of a merge; the weights whose layout the result has, and those that are copied from, are as the target wants them."""
    seen = [*opened]
    if anchor is None and opened:
        seen = [target.reference(one) if at in (0, len(opened) - 1) else one for at, one in enumerate(opened)]
    inputs = [
        Input(entry["id"], order, one, evidence)
        for order, (entry, one, evidence) in enumerate(zip(facts.known.inputs, seen, facts.measured), 1)
    ]
    base = None if anchor is None else target.reference(anchor)
    return MergeTask.of(operator.technique, operator.params, base, inputs, facts.tied)


def taken_in(
    derivation: Derivation, base: Weights | None, opened: Sequence[Weights], way: Way
) -> tuple[Lineage, ties.Ties]:
    """The lineage of inputs that may be merged, and the ties that hold in all of them. A running model that a merge wrote need
    not be related to the base.
    """
    is_fold = derivation.operator.form == "fold"
    exempt = 0 if is_fold and METADATA_KEY in opened[0].metadata else None
    said, tied = check_inputs(base, opened, shown(opened, derivation.ids), way.rules, exempt)
    if derivation.is_named:
        known = Lineage.given(derivation.members)
    else:
        known = by_content(base, opened, derivation.ids, way.execution.threads)
    return dataclasses.replace(known, notes=said + known.notes), tied


def ready(
    task: MergeTask, way: Way, memory: KeptThresholds, ask: Ask | None = None
) -> tuple[Findings, tuple[str, ...]]:
    """Statistics over whole tensors, computed unless kept; and why some could not be kept."""
    ask = ask or Surveyor(task, task.combined, way.execution.threads).answer
    found = prepare(task, ask, memory.recall())
    return found, memory.store(found)


def metadata(task: MergeTask, form: str, known: Lineage) -> dict[str, str]:
    """The reference's own metadata, and a record of how this file was made."""
    record: dict[str, Any] = {
        "technique": task.technique.name,
        "form": form,
        "params": effective(task.params, len(known.inputs)),
        "inputs": known.inputs,
        **known.about,
    }
    if task.technique.origin is not None:
        record["source"] = task.technique.origin.source
    return {"format": "pt", **task.reference.metadata, METADATA_KEY: spliced(record)}
