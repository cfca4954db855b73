"""Merges whose tensors are not all made alike: layers taken from ranges of models, and parameters that differ between tensors.

A `Group` is some tensors of the output with the models that they are made of, each seen under the output's names. Within a group
every tensor has an operator and the members that take part; tensors that agree in both are one merge. Statistics of whole tensors
therefore cover the tensors of one such merge, which is why only operators that look at single tensors are taken where several are
asked for.

Invariant: a tensor has the bytes that a merge of all tensors with its operator and members gives it.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merge_service.anatomy.structure import some
from merge_service.blocks.questions import NOTHING
from merge_service.checkpoints.adapters.opening import open_weights
from merge_service.checkpoints.header import TensorInfo
from merge_service.checkpoints.target import Target
from merge_service.checkpoints.ties import Ties, apart
from merge_service.checkpoints.views.rows import Reworded, Rows
from merge_service.checkpoints.views.view import View
from merge_service.checkpoints.weights import Weights
from merge_service.engine.assembly import assemble, assemble_in_turn
from merge_service.engine.compute import Compute, site_of
from merge_service.engine.prepare import prepare
from merge_service.engine.stream_state import METADATA_KEY, Ends
from merge_service.engine.survey import Surveyor
from merge_service.engine.task import Input, MergeTask
from merge_service.errors import IncompatibleCheckpoint, TechniqueError
from merge_service.merging.derivation import Operator, Out, Way
from merge_service.merging.intake import by_content, check_baseless, check_inputs, shown, versions
from merge_service.merging.report import MergeReport


@dataclass(frozen=True)
class Seen:
    """A model under the output's names: `names` maps the names of the output to its own (None: all, as they are). `factors`
    multiply tensors, by the output's names. With `rows`, embeddings and heads are seen over another vocabulary.
    """

    path: Path
    names: Mapping[str, str] | None = None
    factors: Mapping[str, float] = field(default_factory=dict)
    rows: Rows | None = None


Choice = tuple[Operator, tuple[int, ...]]
"""How a tensor is made: the operator, and which members of the group take part, by their place."""


@dataclass(frozen=True)
class Group:
    """Tensors of the output that are made of the same models. `choose` gives the `Choice` for a tensor by its name. Models of which
    other layers are taken than of the first are not `related`: their layers need not lie near each other.
    """

    base: Seen | None
    members: tuple[Seen, ...]
    choose: Callable[[str], Choice]
    related: bool = True


@dataclass(frozen=True)
class Admitted:
    """A group of which the models are open, fit each other, and are seen under the output's names. `ids` are the members'."""

    base: Weights | None
    members: Sequence[Weights]
    ids: Sequence[str]
    tied: Ties
    choices: Mapping[str, Choice]

    @property
    def reference(self) -> Weights:
        """The weights whose layout the output has."""
        return self.base or self.members[0]


@dataclass(frozen=True)
class Opening:
    """How models are opened: open as long as `stack`, and then seen as `seen` gives them."""

    stack: contextlib.ExitStack
    seen: Callable[[Weights], Weights] = lambda weights: weights

    def open(self, path: Path, base: Path | None) -> Weights:
        """The weights at a path, those of an adapter on a base."""
        return self.seen(self.stack.enter_context(open_weights(path, base)))


@dataclass(frozen=True)
class Whole:
    """The layout of the output."""

    tensors: dict[str, TensorInfo]


def combine_groups(
    groups: Sequence[Group],
    about: Mapping[str, Any],
    out: Out,
    way: Way = Way(),
    ids: Mapping[Path, str] = {},
) -> MergeReport:
    """Merge groups into one model. `about` describes the merge in the output's metadata, `ids` name models by their paths.

    Raises as `combine` does, and `TechniqueError` if operators vary that look at more than one tensor.
    """
    began = time.perf_counter()
    if way.split is not None:
        raise TechniqueError(
            "layers and parameters that differ between tensors are merged by one process; leave --workers out"
        )
    with contextlib.ExitStack() as stack:
        known, admitted, notes = admit_groups(groups, ids, way, Opening(stack))
        target, whole = laid_out(groups, admitted, out)
        first = {"format": "pt", **admitted[0].reference.metadata}
        record = {"form": "merge", "inputs": [*known.values()], "versions": versions(), **about}
        moved: list[float | None] = []
        with target.open(
            whole, {**first, METADATA_KEY: json.dumps(record, sort_keys=True)}, way.durable
        ) as writer:
            for one in admitted:
                moved += [_assemble(task, Ends(writer), way) for task in tasks_of(one, target)]
    norms = [norm for norm in moved if norm is not None]
    return MergeReport(
        out=target.place(whole),
        technique=str(about.get("technique", "")),
        params=dict(about.get("params", {})),
        experts=len(known),
        parameters=sum(info.numel for info in whole.tensors.values() if info.kind.is_float),
        seconds=time.perf_counter() - began,
        merged_norm=math.hypot(*norms) if norms and len(norms) == len(moved) else None,
        notes=tuple(dict.fromkeys((*notes, *target.notes))),
        inputs=tuple(known.values()),
    )


def admit_groups(
    groups: Sequence[Group], ids: Mapping[Path, str], way: Way, opening: Opening
) -> tuple[dict[Path, dict[str, str]], list[Admitted], list[str]]:
    """The members by path, the groups with their models open and checked, and notes. Raises as `combine_groups`."""
    notes: list[str] = []
    known = _named(groups, ids, way, opening)
    admitted = [_admit(group, known, opening, way, notes) for group in groups]
    _check_local(admitted)
    return known, admitted, notes


def laid_out(groups: Sequence[Group], admitted: Sequence[Admitted], out: Out) -> tuple[Target, Whole]:
    """The files to write, and their layout."""
    separate = [pair for one in admitted if (pair := apart(one.reference, one.tied))]
    target = out.target(_sources(groups), separate[0] if separate else None)
    return target, Whole(_laid([target.reference(one.reference).tensors for one in admitted]))


def _named(
    groups: Sequence[Group], ids: Mapping[Path, str], way: Way, opening: Opening
) -> dict[Path, dict[str, str]]:
    """The id, file and sha256 of every member, by path."""
    bases = {one.path: group.base.path if group.base else None for group in groups for one in group.members}
    paths = list(bases)
    with contextlib.ExitStack() as stack:
        held = replace(opening, stack=stack)
        opened = [held.open(path, bases.get(path)) for path in paths]
        known = by_content(None, opened, [ids.get(path) for path in paths], way.execution.threads)
    return dict(zip(paths, known.inputs))


def _admit(
    group: Group,
    known: Mapping[Path, dict[str, str]],
    opening: Opening,
    way: Way,
    notes: list[str],
) -> Admitted:
    """The group with its models open and checked. Raises the `CheckpointError` that fits."""
    base = None if group.base is None else _open(group.base, opening)
    members = [_open(one, opening, group.base.path if group.base else None) for one in group.members]
    rules = way.rules if group.related else replace(way.rules, any_base=True)
    found, tied = check_inputs(base, members, shown(members, [None] * len(members)), rules)
    notes += found
    if tied:
        pairs = [f"{alias} is {name}" for alias, name in tied.items()]
        notes.append(f"tied tensors are merged as one: {some(pairs)}")
    names = (base or members[0]).tensors
    choices = {name: group.choose(tied.get(name, name)) for name in names}
    if base is None:
        for operator, _ in choices.values():
            check_baseless(operator, "give the base; in slices, with its layers in each of them")
    members = [_times(one, seen.factors) for one, seen in zip(members, group.members)]
    return Admitted(base, members, [known[one.path]["id"] for one in group.members], tied, choices)


def _open(seen: Seen, opening: Opening, base: Path | None = None) -> Weights:
    held = opening.open(seen.path, base)
    if seen.rows is not None:
        paths = {path for given in seen.rows.given.values() for path, _ in given}
        held = Reworded(held, seen.rows, {path: opening.open(path, base) for path in paths})
    if seen.names is None:
        return held
    missing = [there for there in seen.names.values() if there not in held.tensors]
    if missing:
        raise IncompatibleCheckpoint(
            f"{seen.path} has no tensor {missing[0]}, which the recipe takes from it"
        )
    return View(held, seen.names)


def _times(weights: Weights, factors: Mapping[str, float]) -> Weights:
    """The weights with their factors: applied after admission, which would take a multiple of a model for an unrelated one."""
    return View(weights, {name: name for name in weights.tensors}, factors) if factors else weights


def _check_local(admitted: Sequence[Admitted]) -> None:
    """Raise `TechniqueError` for an operator that looks at more than one tensor, if tensors are made differently."""
    ways = {_key(choice): choice[0] for one in admitted for choice in one.choices.values()}
    if len(ways) == len(admitted) == 1:
        return
    for operator in ways.values():
        name, params = operator.technique.name, operator.params
        if params.get("granularity", "tensor") not in ("tensor", "row"):
            raise TechniqueError(
                f"{name} takes thresholds and majorities over granularity {params['granularity']}, but layers or parameters differ "
                "between tensors; set granularity: tensor"
            )
        if operator.technique.scale.by_name or operator.technique.ordered:
            raise TechniqueError(
                f"{name} depends on the whole model, so neither its layers nor its parameters can differ between tensors"
            )


def _key(choice: Choice) -> tuple[str, str, tuple[int, ...]]:
    operator, members = choice
    return operator.technique.name, json.dumps(operator.params, sort_keys=True), members


def _sources(groups: Sequence[Group]) -> list[Path]:
    bases = [group.base.path for group in groups if group.base]
    return list(dict.fromkeys([*bases, *(one.path for group in groups for one in group.members)]))


def _laid(parts: Sequence[Mapping[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """The tensors of all groups. Raises `TechniqueError` if two give the same one."""
    tensors: dict[str, TensorInfo] = {}
    for part in parts:
        twice = tensors.keys() & part.keys()
        if twice:
            raise TechniqueError(
                f"the recipe makes {min(twice)} twice; every tensor belongs to one slice or module"
            )
        tensors |= part
    return tensors


def tasks_of(group: Admitted, target: Target) -> Iterator[MergeTask]:
    """One task for the tensors that have the same operator and members."""
    parts: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for name, choice in group.choices.items():
        parts.setdefault(_key(choice), []).append(name)
    for names in parts.values():
        operator, members = group.choices[names[0]]
        own = {name: name for name in names}
        base = None if group.base is None else target.reference(View(group.base, own))
        seen: list[Weights] = [View(group.members[at], own) for at in members]
        if base is None:
            seen = [target.reference(one) if at in (0, len(seen) - 1) else one for at, one in enumerate(seen)]
        inputs = [Input(group.ids[at], order, one) for order, (at, one) in enumerate(zip(members, seen), 1)]
        tied = {alias: name for alias, name in group.tied.items() if alias in own}
        yield MergeTask.of(operator.technique, operator.params, base, inputs, tied)


def _assemble(task: MergeTask, ends: Ends, way: Way) -> float | None:
    """Make and store the tensors of a task; the norm of how far they moved from the base, if it is measured."""
    site = site_of(way.execution.device)
    if task.in_turn:
        lies, _ = assemble_in_turn(task, site, NOTHING, ends, way.execution)
    else:
        found = prepare(task, Surveyor(task, task.combined, way.execution.threads, site).answer)
        lies = assemble(Compute(task, found, site), ends, way.execution)
    return lies.merged_norm if lies else None
