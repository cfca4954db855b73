"""What a trajectory runs under, by dotted key: everything in which two trajectories of any two studies may differ.

Initialization, deployment, technique and its parameters, and the seed are fields of `TrajectoryPlan`; all else is here. It is for
people, tables and filters. Invariant: settings never bear on a fingerprint, and what has no effect on a trajectory is left out.
"""

from collections.abc import Mapping, Sequence

from merge_service import timelines as timeline
from pipeline.identity import fingerprint
from pipeline.kinds.specs import SourceSpec
from pipeline.plan.steps import World
from pipeline.study.grid import Cell
from pipeline.study.sections_stream import DRAWN

SHORT = 12
"""Digits of a digest that tell contents apart for people."""


def settings_of(cell: Cell, world: World, evaluation: Mapping[str, object]) -> dict[str, object]:
    """The settings of one trajectory, {"recipe.lr": 0.001, ...}; what trains nothing has neither recipe nor budget.

    `evaluation` is how it is scored, without the split. Lists stay lists, so a value is plain JSON.
    """
    sections: dict[str, object] = {
        "model": _model(cell, world),
        "stream": _stream(cell, world),
        "strategy": {"parity": cell.parity, "alone": _alone(cell)},
    }
    if timeline.needs_experts(cell.strategy):
        sections["recipe"] = cell.recipe.model_dump(mode="json")
        sections["budget"] = cell.budget.model_dump(mode="json")
    if timeline.measured(cell.strategy):
        sections["statistics"] = dict(cell.statistics)
    if timeline.learns(cell.strategy):
        sections["learning"] = dict(cell.learning)
    return flat_settings({**sections, "evaluation": {"split": cell.split, **evaluation}})


def flat_settings(sections: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested settings under dotted keys, without those that are None."""
    found: dict[str, object] = {}
    for key, value in sections.items():
        if isinstance(value, Mapping):
            found |= flat_settings(value, f"{prefix}{key}.")
        elif value is not None:
            found[prefix + key] = value
    return found


def scored_on(
    sources: Sequence[SourceSpec], roles: list[list[str]], fraction: float, seed: int
) -> dict[str, object]:
    """How trajectories are scored: `sets` names the contents that KA and ZS are means over, so that equal ones compare.

    `roles` are the adaptation and the held-out sets.
    """
    drawn = {"fraction": fraction, "seed": seed} if fraction < 1 else {}
    return {"sets": fingerprint([[*sources], roles, drawn])[:SHORT], **drawn}


def _model(cell: Cell, world: World) -> dict[str, object]:
    values = cell.model.model_dump(mode="json")
    if cell.model.pretrained is not None:
        del values["seed"]
    return {**values, "sha256": world.facts.weights[:SHORT]}


def _stream(cell: Cell, world: World) -> dict[str, object]:
    section = cell.stream
    values = section.model_dump(mode="json", include={"order", "chunks", "seed", "reverse", "table", "file"})
    if section.file is not None:
        values = {"file": section.file}
    elif section.order not in DRAWN:
        del values["seed"]
    return {**values, "id": world.stream_id[:SHORT]}


def _alone(cell: Cell) -> str | None:
    """What `all` gives while there is one expert, where that is not the merge of it."""
    merges = "all" in timeline.policies(cell.strategy)
    return cell.strategy.alone if merges and cell.strategy.alone != "merge" else None
