"""Removes one expert from a streaming state: the same pass over the blocks, with `remove` in place of `add`.

Exact in real arithmetic, for rules whose state is a sum or a mean. In floating point the last digits keep a trace of the expert
(of the order of its magnitude times the rounding of a float), and an almost tied election may change its sign. Merging the
remaining experts again has neither effect.

Invariant: a state is reduced only by the bytes that were added to it, as far as it records their sha256.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from merge_service.checkpoints.ties import Ties
from merge_service.checkpoints.weights import Weights
from merge_service.engine.stream_state import StreamState
from merge_service.engine.task import Input, MergeTask
from merge_service.errors import TechniqueError
from merge_service.techniques.definition import Technique
from merge_service.techniques.families.averages import Mean
from merge_service.techniques.place import Array, Election, Place, State
from merge_service.techniques.rule import Rule
from merge_service.techniques.shares import is_weighed, leaving_share


class Removing(Rule):
    """A rule whose `add` removes an expert, by another rule's `remove`; `share` is its weight over that of the remaining ones."""

    def __init__(self, rule: Any, share: float) -> None:
        super().__init__(rule.params)
        self.floats, self.words, self.averages = rule.floats, rule.words, rule.averages
        self.rule, self.share = rule, share

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        self.rule.remove(xp, state, x, replace(place, share=self.share))

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        return self.rule.result(xp, state, majority)


def retraction(
    technique: Technique, params: Mapping[str, Any], base: Weights, leaving: Input, count: int, tied: Ties
) -> MergeTask:
    """The task that removes its one input, expert number `leaving.order`, from a held state of `count` experts.

    Its parameters are those of the remaining experts. Raises TechniqueError if the state does not allow it.
    """
    rule: Any = technique.rule(params)
    if not hasattr(rule, "remove"):
        raise TechniqueError(
            f"{technique.name}{_consensus(params)}: an expert cannot be taken out of its state, because the state does not "
            "keep what the others give without it. Merge the experts that stay anew"
        )
    if isinstance(params.get("density"), list):
        raise TechniqueError(
            f"{technique.name}: with a density for each expert none can be taken out of the state; merge those that stay anew"
        )
    if count == 1:
        raise TechniqueError(
            f"{leaving.id!r} is the only expert of the state; without it there is only the base: start again without a state"
        )
    even = 1 / (count - 1)
    weighs = technique.space == "weights" or (rule.weighs and is_weighed(params))
    share = leaving_share(params, leaving.order, count) if weighs else even
    alone = replace(leaving, order=1)  # the only expert of its task; `share` holds its weight
    return MergeTask(
        technique, without(params, leaving.order), base, (alone,), tied, Removing(rule, share), Removing(Mean(params), even)
    )  # fmt: skip


def without(params: Mapping[str, Any], order: int) -> dict[str, Any]:
    """The parameters of the remaining experts: explicit weights lose the entry of number `order`."""
    weights = params.get("weights")
    return dict(params) if weights is None else {**params, "weights": weights[: order - 1] + weights[order:]}


def check_bytes(held: StreamState, order: int, expert: Weights, sha256: str | None) -> tuple[str, ...]:
    """Raise `TechniqueError` unless `expert` is what the state contains; returns a note if the state does not record that."""
    entry = held.inputs[order - 1]
    if "sha256" not in entry:
        return (
            f"{entry['id']}: the state does not record its sha256, so it was not checked that these are its bytes",
        )
    found = sha256 or expert.digests()[1]
    if found != entry["sha256"]:
        raise TechniqueError(
            f"{expert.path} is not the expert {entry['id']!r} that is in {held.checkpoint.path}: its sha256 is {found}, "
            f"{entry['sha256']} went in; give the same file, or merge the experts that stay anew"
        )
    return ()


def _consensus(params: Mapping[str, Any]) -> str:
    return f" with consensus {params['consensus']}" if "consensus" in params else ""
