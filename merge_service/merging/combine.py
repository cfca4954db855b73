"""Merging checkpoints: all at once, one into a running model, or as a stream that remembers.

    merge     all experts, in their order
    fold      a running model and one new expert (TIME's EMA)
    advance   one more expert into a streaming state; the merged model is bit-identical to `merge` of all of them
    retract   one expert out of it again; replace: one for another

All validate everything they can before a block is computed, write the output once, and let it appear under its
name only when it is whole. Memory is a few blocks per thread, whatever the number of experts.
"""

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_service.blocks.device import Host
from merge_service.blocks.questions import Ask, Findings
from merge_service.blocks.spans import BLOCK
from merge_service.checkpoints import ties
from merge_service.checkpoints.checkpoint import Checkpoint
from merge_service.checkpoints.target import Target
from merge_service.checkpoints.writer import CheckpointWriter
from merge_service.engine.assembly import Execution, assemble
from merge_service.engine.compute import Compute, site_of
from merge_service.engine.prepare import prepare
from merge_service.engine.retraction import check_bytes, retraction
from merge_service.engine.split import Split
from merge_service.engine.stream_state import METADATA_KEY, Ends, StreamState, effective, state_writer
from merge_service.engine.survey import Surveyor
from merge_service.engine.task import Input, MergeTask
from merge_service.engine.thresholds_cache import Keep, KeptThresholds
from merge_service.errors import TechniqueError
from merge_service.files.leftovers import temporary
from merge_service.merging.intake import (
    Lineage,
    Rules,
    by_content,
    check_count,
    check_inputs,
    open_all,
    shown,
)
from merge_service.merging.report import MergeReport, report_of
from merge_service.techniques.definition import Form, Technique
from merge_service.techniques.registry import get

PathLike = Path | str


@dataclass(frozen=True)
class Way:
    """How a merge is carried out, which never changes a tensor of what comes out."""

    execution: Execution
    keep_limits: Keep
    shard_bytes: int | None
    split: Split | None
    rules: Rules


def merge(
    technique: str,
    params: Mapping[str, Any],
    base: PathLike | None,
    experts: Sequence[PathLike],
    out: PathLike,
    *,
    ids: Sequence[str | None] | None = None,
    sha256: Mapping[str, str] | None = None,
    lineage: bool = False,
    rules: Rules = Rules(),
    threads: int = 1,
    block: int = BLOCK,
    measure: bool = True,
    device: str | None = None,
    split: Split | None = None,
    keep_limits: Keep = False,
    shard_bytes: int | None = None,
) -> MergeReport:
    """Merge `experts` (files, sharded indices or directories), in this order, into `out`.

    `out` is a .safetensors file, or a directory when the inputs are directories with an open_clip configuration, which
    is copied. With `shard_bytes` a model of more bytes goes to NAME-00001-of-0000N.safetensors beside NAME.safetensors and
    NAME.safetensors.index.json (`shards.py`), to which the report's `out` then points; an `out` of that index name asks
    for it at any size. The output has the tensors, dtypes and metadata of the base (of the first expert without one), plus an
    entry `temporal_merge` that says how it was made. With no experts it is the base.

    `ids` name experts and seed their random masks; one that is None comes from the tensors' content. With `lineage`, or when
    an id is None, the output names file and sha256 of every input and the versions that computed; else it has `sha256` by id
    as given. `rules` say which inputs are taken. `measure=False` saves computing `merged_norm`. With `split` the work is done in parts, elsewhere.
    `keep_limits` keeps the thresholds that were found (`kept_limits.py`); those that are kept already are always used.

    Raises `TechniqueError` (technique, parameters, number of experts), or the kind of `CheckpointError` that fits, naming the
    expert and tensor; `out` is then untouched.
    """
    plugin = get(technique)
    resolved = plugin.resolve(params, "merge", strict=True)
    names = list(ids) if ids is not None else [None] * len(experts)
    check_count(plugin, resolved, base, len(experts), names)
    way = Way(Execution(threads, block, measure, device), keep_limits, shard_bytes, split, rules)
    given = [name for name in names if name is not None]
    known = Lineage.given(given, sha256) if len(given) == len(names) and not lineage else None
    if plugin.ordered and experts:
        assert base is not None
        return _replay(plugin, resolved, base, experts, names, out, known, way)
    return _combine(plugin, resolved, "merge", base, experts, names, out, known, way)


def fold(
    technique: str,
    params: Mapping[str, Any],
    base: PathLike | None,
    running: PathLike,
    new: PathLike,
    out: PathLike,
    *,
    ids: tuple[str, str] = ("running", "new"),
    sha256: Mapping[str, str] | None = None,
    rules: Rules = Rules(),
    threads: int = 1,
    block: int = BLOCK,
    measure: bool = True,
    device: str | None = None,
    split: Split | None = None,
    keep_limits: Keep = False,
    shard_bytes: int | None = None,
) -> MergeReport:
    """Merge the newest expert into the running model: one step of TIME's EMA, f({running, new}; base).

    A different operator from `merge` of all experts, except for running means. Arguments and errors as `merge`.
    """
    plugin = get(technique)
    resolved = plugin.resolve(params, "fold", strict=True)
    check_count(plugin, resolved, base, 2, list(ids))
    way = Way(Execution(threads, block, measure, device), keep_limits, shard_bytes, split, rules)
    known = Lineage.given(ids, sha256)
    return _combine(plugin, resolved, "fold", base, [running, new], list(ids), out, known, way)


def advance(
    technique: str,
    params: Mapping[str, Any],
    base: PathLike,
    expert: PathLike,
    out: PathLike | None,
    *,
    expert_id: str,
    state_in: PathLike | None,
    state_out: PathLike,
    sha256: Mapping[str, str] | None = None,
    lineage: Lineage | None = None,
    rules: Rules = Rules(),
    threads: int = 1,
    block: int = BLOCK,
    measure: bool = True,
    device: str | None = None,
    keep_limits: Keep = False,
    shard_bytes: int | None = None,
    tied: ties.Ties | None = None,
) -> MergeReport:
    """Add one expert to a streaming merge: read `state_in` (None to start), write `state_out` and the merged model.

    `out` is byte-identical to what `merge` writes for all experts so far with the same ids; with `out=None` only the
    state is written. Cost does not depend on how many came before. `lineage` is what the outputs say of the expert, by default
    its id and `sha256`. Besides what `merge` raises: `TechniqueError` when the technique has no streaming form, the state belongs to
    another technique, parameters or base, or holds this id; `BrokenTie` when the experts so far hold two names as one tensor and this
    one does not. A stream whose experts are known beforehand gives what is `tied` in all of them (`ties.tie`) with the first.
    """
    began = time.perf_counter()
    plugin = get(technique)
    plugin.require("stream")
    resolved = plugin.resolve(params, "merge", strict=True)
    known = lineage or Lineage.given([expert_id], sha256)
    with contextlib.ExitStack() as stack:
        anchor, (newest,) = open_all(stack, base, [expert], rules)
        assert anchor is not None
        held = stack.enter_context(StreamState(state_in)) if state_in is not None else None
        seen = held.inputs if held else []
        if held:
            held.check(plugin, resolved, anchor)
            held.check_new(expert_id)
        same = held.ties(anchor) if held else tied
        said, same = check_inputs(anchor, [newest], [expert_id], rules, known=same)
        arrival = Input(expert_id, len(seen) + 1, newest)
        task, site = MergeTask.of(plugin, resolved, anchor, [arrival], same), site_of(device)
        if held:
            held.check_layout(task)
        known = dataclasses.replace(known, inputs=[*seen, *known.inputs], notes=said)
        target = Target.of(out, [base, expert], shard_bytes) if out is not None else None
        found, notes = _ready(task, threads, keep_limits, sha256)
        execution = Execution(threads, block, measure)
        norm = _continue(Compute(task, found, site), held, known, target, state_out, execution)
        return report_of(task, target, known, began, norm, notes)


def retract(
    technique: str,
    params: Mapping[str, Any],
    base: PathLike,
    expert: PathLike,
    out: PathLike | None,
    *,
    expert_id: str,
    state_in: PathLike,
    state_out: PathLike,
    sha256: Mapping[str, str] | None = None,
    threads: int = 1,
    block: int = BLOCK,
    measure: bool = True,
    keep_limits: Keep = False,
    shard_bytes: int | None = None,
) -> MergeReport:
    """Take one expert out of a streaming merge: read `state_in` and the expert, write `state_out` and the merged model.

    `params` are those the state was made with; the report holds those of the experts that stay (explicit weights lose one
    entry), to go on with. What is written equals a merge of those that stay up to rounding: see `retraction.py`. Besides
    what `advance` raises: `TechniqueError` when the id is not in the state, `expert` is not what went in under it, or the
    technique cannot: largest values, and schedules that weigh by place (but for the newest expert).
    """
    began = time.perf_counter()
    plugin = get(technique)
    plugin.require("stream")
    resolved = plugin.resolve(params, "merge", strict=True)
    with contextlib.ExitStack() as stack:
        anchor, leaving = (stack.enter_context(Checkpoint.open(path)) for path in (base, expert))
        held = stack.enter_context(StreamState(state_in))
        held.check(plugin, resolved, anchor)
        order = held.order_of(expert_id)
        left = Input(expert_id, order, leaving)
        any_base = Rules(any_base=True)
        said, same = check_inputs(anchor, [leaving], [expert_id], any_base, known=held.ties(anchor))
        task, site = retraction(plugin, resolved, anchor, left, len(held.inputs), same), Host()
        unchecked = check_bytes(held, order, expert, (sha256 or {}).get(expert_id))
        known = Lineage([entry for entry in held.inputs if entry["id"] != expert_id], notes=said + unchecked)
        held.check_layout(task)
        target = Target.of(out, [base, expert], shard_bytes) if out is not None else None
        found, notes = _ready(task, threads, keep_limits, sha256)
        execution = Execution(threads, block, measure)
        norm = _continue(Compute(task, found, site), held, known, target, state_out, execution)
        return report_of(task, target, known, began, norm, notes)


def replace(
    technique: str,
    params: Mapping[str, Any],
    base: PathLike,
    old: PathLike,
    new: PathLike,
    out: PathLike | None,
    *,
    expert_id: str,
    state_in: PathLike,
    state_out: PathLike,
    sha256: Mapping[str, str] | None = None,
    **options: Any,
) -> MergeReport:
    """`retract` of `old` and `advance` of `new` under the same id, which is then the newest; an explicit weight goes with it.

    `sha256` is that of `new`; `old` is hashed if the state records what it was. `options` as of `advance`.
    """
    resolved = get(technique).resolve(params, "merge", strict=True)
    between = temporary(Path(state_out))
    try:
        with StreamState(state_in) as held:
            order = held.order_of(expert_id)
        left = retract(
            technique, resolved, base, old, None, expert_id=expert_id, state_in=state_in, state_out=between, **options
        )  # fmt: skip
        then = left.params
        if then.get("weights") is not None:
            then = {**then, "weights": [*then["weights"][: left.experts], resolved["weights"][order - 1],
                                        *then["weights"][left.experts :]]}  # fmt: skip
        report = advance(
            technique, then, base, new, out, expert_id=expert_id, state_in=between, state_out=state_out, sha256=sha256, **options
        )  # fmt: skip
        return dataclasses.replace(report, notes=left.notes + report.notes)
    finally:
        between.unlink(missing_ok=True)


def _combine(
    plugin: Technique,
    params: dict[str, Any],
    form: Form,
    base: PathLike | None,
    experts: Sequence[PathLike],
    ids: Sequence[str | None],
    out: PathLike,
    known: Lineage | None,
    way: Way,
) -> MergeReport:
    if way.split is not None and way.shard_bytes is not None:
        raise TechniqueError("workers write one file between them; leave --shard-size or --workers out")
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        anchor, opened = open_all(stack, base, experts, way.rules)
        known, tied = _taken_in(anchor, opened, form, ids, known, way)
        inputs = [
            Input(entry["id"], order, weights)
            for order, (entry, weights) in enumerate(zip(known.inputs, opened), 1)
        ]
        task = MergeTask.of(plugin, params, anchor, inputs, tied)
        site = site_of(way.execution.device)
        target = Target.of(out, [*experts, *([base] if base is not None else [])][::-1], way.shard_bytes)
        team = stack.enter_context(way.split.team(task, way.execution)) if way.split else None
        ask = team.answer if team else None
        found, notes = _ready(task, way.execution.threads, way.keep_limits, known.sha256, ask)
        writer = stack.enter_context(target.open(task.reference, _metadata(task, form, params, known)))
        if team is None:
            norm = assemble(Compute(task, found, site), Ends(writer), way.execution)
        else:
            assert isinstance(writer, CheckpointWriter)
            norm = team.assemble(task, found, writer, way.execution)
        return report_of(task, target, known, began, norm, notes)


def _taken_in(
    base: Checkpoint | None,
    opened: Sequence[Checkpoint],
    form: Form,
    ids: Sequence[str | None],
    known: Lineage | None,
    way: Way,
) -> tuple[Lineage, ties.Ties]:
    """What the output says of inputs that may be merged, and what is tied in all of them; a running model that a merge made is
    not asked where it comes from."""
    exempt = 0 if form == "fold" and METADATA_KEY in opened[0].metadata else None
    said, tied = check_inputs(base, opened, shown(opened, ids), way.rules, exempt)
    found = known or by_content(base, opened, ids, way.execution.threads)
    return dataclasses.replace(found, notes=said + found.notes), tied


def _replay(
    plugin: Technique,
    params: dict[str, Any],
    base: PathLike,
    experts: Sequence[PathLike],
    ids: Sequence[str | None],
    out: PathLike,
    known: Lineage | None,
    way: Way,
) -> MergeReport:
    """All experts at once for a technique that takes them one after another: the stream from the first on."""
    if way.split is not None:
        raise TechniqueError(
            f"{plugin.name} takes experts one after another and cannot be split over workers; leave --workers out"
        )
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        known, tied = _taken_in(*open_all(stack, base, experts, way.rules), "merge", ids, known, way)
    beside = Path(out).absolute().parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".states-", dir=beside) as states:
        state: Path | None = None
        for number, (entry, expert) in enumerate(zip(known.inputs, experts), 1):
            target = Path(states) / f"{number}.safetensors"
            report = advance(
                plugin.name,
                params,
                base,
                expert,
                out if number == len(experts) else None,
                expert_id=entry["id"],
                state_in=state,
                state_out=target,
                sha256=known.sha256,
                lineage=dataclasses.replace(known, inputs=[entry]),
                rules=way.rules,
                threads=way.execution.threads,
                block=way.execution.block,
                measure=way.execution.measure,
                device=way.execution.device,
                shard_bytes=way.shard_bytes,
                tied=tied,
            )
            if state:
                state.unlink()
            state = target
    notes = tuple(dict.fromkeys((*known.notes, *report.notes)))
    return dataclasses.replace(report, seconds=time.perf_counter() - began, notes=notes)


def _ready(
    task: MergeTask,
    threads: int,
    keep_limits: Keep,
    sha256: Mapping[str, str] | None,
    ask: Ask | None = None,
) -> tuple[Findings, tuple[str, ...]]:
    """Everything that needs a look at whole tensors, as far as it is not kept; and what could not be kept."""
    memory = KeptThresholds(task, keep_limits, sha256)
    found = prepare(task, ask or Surveyor(task, task.combined, threads).answer, memory.recall())
    return found, memory.store(found)


def _continue(
    compute: Compute,
    held: StreamState | None,
    known: Lineage,
    target: Target | None,
    state_out: PathLike,
    execution: Execution,
) -> float | None:
    """Write the state after `inputs`, and the merged model if there is a target; its norm."""
    task = compute.task
    with contextlib.ExitStack() as stack:
        keep = stack.enter_context(state_writer(state_out, task, known.inputs))
        writer = None
        if target:
            metadata = _metadata(task, "merge", effective(task.params, len(known.inputs)), known)
            writer = stack.enter_context(target.open(task.reference, metadata))
        return assemble(compute, Ends(writer, held, keep), execution)


def _metadata(task: MergeTask, form: Form, params: Mapping[str, Any], known: Lineage) -> dict[str, str]:
    """The reference's own metadata, and how this file was made."""
    record = {
        "technique": task.technique.name,
        "form": form,
        "params": dict(params),
        "inputs": known.inputs,
        **known.about,
    }
    if task.technique.origin is not None:
        record["source"] = task.technique.origin.source
    return {"format": "pt", **task.reference.metadata, METADATA_KEY: json.dumps(record, sort_keys=True)}
