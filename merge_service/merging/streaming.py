"""Streaming merges: add an expert to a state, take one out again, or replace one.

Invariant: the model after an arrival has the bytes of `combine` of all experts so far, and the cost of an arrival does not depend
on their number.
"""

import contextlib
import dataclasses
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from merge_service.blocks.device import Host
from merge_service.checkpoints import ties
from merge_service.checkpoints.target import Target, overwrites
from merge_service.engine.assembly import assemble
from merge_service.engine.compute import Compute, site_of
from merge_service.engine.inputs import Inputs
from merge_service.engine.retraction import check_bytes, retraction
from merge_service.engine.stream_state import Ends, StreamState, check_room, state_writer
from merge_service.engine.survey import Surveyor
from merge_service.engine.task import Input, MergeTask
from merge_service.engine.thresholds_cache import KeptThresholds
from merge_service.errors import CheckpointError, TechniqueError
from merge_service.files.leftovers import temporary
from merge_service.merging.combine import combine, metadata, ready, taken_in
from merge_service.merging.derivation import Derivation, Lineage, Member, Operator, Out, Rules, Way
from merge_service.merging.evidence import gather
from merge_service.merging.intake import check_count, check_inputs, open_all
from merge_service.merging.report import Done, MergeReport, report_of


@dataclass(frozen=True)
class States:
    """The files of a streaming state: before (None to start) and after."""

    before: Path | None
    after: Path

    def check(self, derivation: Derivation, out: Out | None) -> None:
        """Raise `CheckpointError` if a state would replace the base or an expert, or the model a state. A state may go on in its place."""
        if any(overwrites(self.after, path) for path in derivation.sources):
            raise CheckpointError(
                f"state_out {self.after} is one of the inputs and would be lost; give another state_out"
            )
        held = [state.resolve() for state in (self.before, self.after) if state is not None]
        if out is not None and out.path.resolve() in held:
            raise CheckpointError(f"--out {out.path} is the place of the state; give another --out")


def advance(
    derivation: Derivation,
    states: States,
    out: Out | None,
    way: Way = Way(),
    known: Lineage | None = None,
    tied: ties.Ties | None = None,
) -> MergeReport:
    """Add the one member of a derivation to a streaming merge; with `out=None` only the state is written.

    `known` is the lineage entry of the expert, by default its id and sha256. `tied` are the ties that hold in all experts of a
    stream (`ties.tie`), if they are known at the first one. Besides what `combine` raises: `TechniqueError` when the state
    belongs to another technique, parameters or base, or holds this id; `BrokenTie` when the experts so far hold two names as one
    tensor and this one does not; `NoRoom` when the state would not leave `way.reserve` bytes free.
    """
    began = time.perf_counter()
    operator, (member,) = derivation.operator, derivation.members
    assert member.id is not None
    known = known or Lineage.given(derivation.members)
    states.check(derivation, out)
    with contextlib.ExitStack() as stack:
        anchor, (newest,) = open_all(stack, derivation.base, [member.path], way.rules)
        assert anchor is not None
        held = stack.enter_context(StreamState(states.before)) if states.before is not None else None
        seen = held.inputs if held else Inputs.of([])
        if held:
            held.check(operator.technique, operator.params, anchor)
            held.check_new(member.id)
        same = held.ties(anchor) if held else tied
        said, same = check_inputs(anchor, [newest], [member.id], way.rules, known=same)
        (measured,) = gather(stack, operator, anchor, derivation.members, [newest])
        arrival = Input(member.id, len(seen) + 1, newest, measured)
        task = MergeTask.of(operator.technique, operator.params, anchor, [arrival], same)
        site = site_of(way.execution.device)
        if way.reserve is not None:
            check_room(states.after, task, way.reserve)
        if held:
            held.check_layout(task)
        sha256 = known.sha256
        known = dataclasses.replace(known, inputs=seen.then(known.inputs), notes=said)
        target = out.target(derivation.sources, ties.apart(anchor, same)) if out else None
        ask = Surveyor(task, task.combined, way.execution.threads, site, held).answer
        found, notes = ready(task, way, KeptThresholds(task, way.keep_thresholds, sha256), ask)
        done = _carry_on(Compute(task, found, site), Step(held, states.after, target, notes), known, way)
        return report_of(task, target, known, began, done)


def retract(derivation: Derivation, states: States, out: Out | None, way: Way = Way()) -> MergeReport:
    """Take the one member of a derivation out of a streaming merge.

    The operator is that of the state; the report holds the parameters of the remaining experts (explicit weights lose one entry),
    for the next call. The result equals a merge of the remaining experts up to rounding: see `engine/retraction.py`. Besides what
    `advance` raises: `TechniqueError` when the id is not in the state, the member is not the one that was added under it, or the
    technique does not allow it: largest values, and schedules, except for the newest expert.
    """
    began = time.perf_counter()
    operator, (member,) = derivation.operator, derivation.members
    assert member.id is not None and derivation.base is not None and states.before is not None
    states.check(derivation, out)
    with contextlib.ExitStack() as stack:
        anchor, (leaving,) = open_all(stack, derivation.base, [member.path], Rules())
        assert anchor is not None
        held = stack.enter_context(StreamState(states.before))
        held.check(operator.technique, operator.params, anchor)
        order = held.order_of(member.id)
        any_base = Rules(any_base=True)
        said, same = check_inputs(anchor, [leaving], [member.id], any_base, known=held.ties(anchor))
        left, count = Input(member.id, order, leaving), len(held.inputs)
        task = retraction(operator.technique, operator.params, anchor, left, count, same)
        unchecked = check_bytes(held, order, leaving, member.sha256)
        staying = Inputs.of(entry for entry in held.inputs if entry["id"] != member.id)
        known = Lineage(staying, notes=said + unchecked)
        held.check_layout(task)
        target = out.target(derivation.sources, ties.apart(anchor, same)) if out else None
        sha256 = Lineage.given(derivation.members).sha256
        found, notes = ready(task, way, KeptThresholds(task, way.keep_thresholds, sha256))
        done = _carry_on(Compute(task, found, Host()), Step(held, states.after, target, notes), known, way)
        return report_of(task, target, known, began, done)


def replace(
    derivation: Derivation, new: Member, states: States, out: Out | None, way: Way = Way()
) -> MergeReport:
    """`retract` of the one member of a derivation and `advance` of `new` under the same id, which is then the newest.

    An explicit weight moves with the id.
    """
    operator, (old,) = derivation.operator, derivation.members
    assert old.id is not None and states.before is not None
    between = temporary(states.after)
    try:
        with StreamState(states.before) as held:
            order = held.order_of(old.id)
        left = retract(derivation, States(states.before, between), None, way)
        then = left.params
        if then.get("weights") is not None:
            then = {**then, "weights": [*then["weights"][: left.experts], operator.params["weights"][order - 1],
                                        *then["weights"][left.experts :]]}  # fmt: skip
        arrival = dataclasses.replace(
            derivation, operator=Operator.of(operator.technique.name, then, "stream"), members=(new,)
        )
        report = advance(arrival, States(between, states.after), out, way)
        return dataclasses.replace(report, notes=left.notes + report.notes)
    finally:
        between.unlink(missing_ok=True)


def replay(derivation: Derivation, out: Out, way: Way = Way()) -> MergeReport:
    """Merge all members by a technique that takes them one after another: the stream from the first on."""
    operator = derivation.operator
    check_count(derivation)
    if way.split is not None:
        raise TechniqueError(
            f"{operator.technique.name} takes experts one after another and cannot be split over workers; leave --workers out"
        )
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        opened = open_all(stack, derivation.base, derivation.paths, way.rules)
        known, tied = taken_in(derivation, *opened, way)
    beside = out.path.absolute().parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".states-", dir=beside) as place:
        state: Path | None = None
        for number, (entry, member) in enumerate(zip(known.inputs, derivation.members), 1):
            after = Path(place) / f"{number}.safetensors"
            one = dataclasses.replace(derivation, members=(dataclasses.replace(member, id=entry["id"]),))
            last = out if number == len(derivation.members) else None
            report = advance(
                one, States(state, after), last, way, Lineage(Inputs.of([entry]), known.about), tied
            )
            if state:
                state.unlink()
            state = after
    notes = tuple(dict.fromkeys((*known.notes, *report.notes)))
    return dataclasses.replace(report, seconds=time.perf_counter() - began, notes=notes)


def merge_all(derivation: Derivation, out: Out, way: Way = Way()) -> MergeReport:
    """What a derivation states, of its members alone: `combine`, or `replay` for a merge that takes experts one after another."""
    operator = derivation.operator
    one_by_one = operator.form == "merge" and operator.technique.ordered and derivation.members
    return replay(derivation, out, way) if one_by_one else combine(derivation, out, way)


@dataclass(frozen=True)
class Step:
    """What a streaming merge continues, what it writes, and the notes so far."""

    held: StreamState | None
    after: Path
    target: Target | None
    notes: tuple[str, ...]


def _carry_on(compute: Compute, step: Step, known: Lineage, way: Way) -> Done:
    """Write the state after `known.inputs`, and the merged model if there is a target."""
    task, writer = compute.task, None
    with contextlib.ExitStack() as stack:
        keep = stack.enter_context(state_writer(step.after, task, known.inputs, way.durable))
        if step.target:
            form = "fold" if task.technique.resumes and "weight" in task.params else "merge"
            made = metadata(task, form, known)
            writer = stack.enter_context(step.target.open(task.reference, made, way.durable))
        lies = assemble(compute, Ends(writer, step.held, keep), way.execution)
    return Done(lies, writer, step.notes, keep.digest_found)
