"""Merging all members of a derivation at once: every expert, or a running model and the newest one.

Everything that can be validated is validated before a block is computed; the output is written once and appears under its name only
when it is complete. Memory is a few blocks per thread, whatever the number of experts.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping
from typing import Any

from merge_service.blocks.questions import Ask, Findings
from merge_service.checkpoints import ties
from merge_service.checkpoints.checkpoint import Checkpoint
from merge_service.checkpoints.writer import CheckpointWriter
from merge_service.engine.assembly import assemble
from merge_service.engine.compute import Compute, site_of
from merge_service.engine.prepare import prepare
from merge_service.engine.stream_state import METADATA_KEY, Ends, effective
from merge_service.engine.survey import Surveyor
from merge_service.engine.task import Input, MergeTask
from merge_service.engine.thresholds_cache import KeptThresholds
from merge_service.errors import TechniqueError
from merge_service.merging.derivation import Derivation, Lineage, Out, Way
from merge_service.merging.intake import by_content, check_count, check_inputs, open_all, shown
from merge_service.merging.report import MergeReport, report_of


def combine(derivation: Derivation, out: Out, way: Way = Way()) -> MergeReport:
    """Merge the members into `out`.

    Raises `TechniqueError` (technique, parameters, number of experts), or the kind of `CheckpointError` that fits, naming the
    expert and tensor; `out` is then untouched.
    """
    check_count(derivation)
    began = time.perf_counter()
    if way.split is not None and out.shard_bytes is not None:
        raise TechniqueError("workers write one file between them; leave --shard-size or --workers out")
    operator = derivation.operator
    with contextlib.ExitStack() as stack:
        anchor, opened = open_all(stack, derivation.base, derivation.paths, way.rules)
        known, tied = taken_in(derivation, anchor, opened, way)
        inputs = [
            Input(entry["id"], order, weights)
            for order, (entry, weights) in enumerate(zip(known.inputs, opened), 1)
        ]
        task = MergeTask.of(operator.technique, operator.params, anchor, inputs, tied)
        site, target = site_of(way.execution.device), out.target(derivation.sources)
        team = stack.enter_context(way.split.team(task, way.execution)) if way.split else None
        found, notes = ready(task, way, known.sha256, team.answer if team else None)
        writer = stack.enter_context(target.open(task.reference, metadata(task, operator.form, known)))
        if team is None:
            norm = assemble(Compute(task, found, site), Ends(writer), way.execution)
        else:
            assert isinstance(writer, CheckpointWriter)
            norm = team.assemble(task, found, writer, way.execution)
        return report_of(task, target, known, began, norm, notes)


def taken_in(
    derivation: Derivation, base: Checkpoint | None, opened: list[Checkpoint], way: Way
) -> tuple[Lineage, ties.Ties]:
    """What the output says of inputs that may be merged, and what is tied in all of them; a running model that a merge made is
    not asked where it comes from."""
    is_fold = derivation.operator.form == "fold"
    exempt = 0 if is_fold and METADATA_KEY in opened[0].metadata else None
    said, tied = check_inputs(base, opened, shown(opened, derivation.ids), way.rules, exempt)
    if derivation.is_named:
        known = Lineage.given(derivation.members)
    else:
        known = by_content(base, opened, derivation.ids, way.execution.threads)
    return dataclasses.replace(known, notes=said + known.notes), tied


def ready(
    task: MergeTask, way: Way, sha256: Mapping[str, str], ask: Ask | None = None
) -> tuple[Findings, tuple[str, ...]]:
    """Everything that needs a look at whole tensors, as far as it is not kept; and what could not be kept."""
    memory = KeptThresholds(task, way.keep_limits, sha256)
    ask = ask or Surveyor(task, task.combined, way.execution.threads).answer
    found = prepare(task, ask, memory.recall())
    return found, memory.store(found)


def metadata(task: MergeTask, form: str, known: Lineage) -> dict[str, str]:
    """The reference's own metadata, and how this file was made."""
    record: dict[str, Any] = {
        "technique": task.technique.name,
        "form": form,
        "params": effective(task.params, len(known.inputs)),
        "inputs": known.inputs,
        **known.about,
    }
    if task.technique.origin is not None:
        record["source"] = task.technique.origin.source
    return {"format": "pt", **task.reference.metadata, METADATA_KEY: json.dumps(record, sort_keys=True)}
