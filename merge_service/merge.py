"""Merging checkpoints: all at once, one into a running model, or as a stream that remembers.

    merge     all experts, in their order
    fold      a running model and one new expert (TIME's EMA)
    advance   one more expert into a streaming state; the merged model is bit-identical to `merge` of all of them
    retract   one expert out of it again; replace: one for another

All validate everything they can before a block is computed, write the output once, and let it appear under its
name only when it is whole. Memory is a few blocks per thread, whatever the number of experts. Each builds the values of
`merge_service.merging.derivation` and hands them on.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_service.blocks.spans import BLOCK
from merge_service.engine.assembly import Execution
from merge_service.engine.split import Split
from merge_service.engine.thresholds_cache import Keep
from merge_service.merging import combine, streaming
from merge_service.merging.derivation import (
    Derivation,
    Member,
    Operator,
    Out,
    PathLike,
    Rules,
    Way,
    members_of,
    out_of,
)
from merge_service.merging.report import MergeReport
from merge_service.merging.streaming import States

__all__ = ["MergeReport", "advance", "fold", "merge", "replace", "retract"]


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
    `keep_limits` keeps the thresholds that were found (`thresholds_cache.py`); those that are kept already are always used.

    Raises `TechniqueError` (technique, parameters, number of experts), or the kind of `CheckpointError` that fits, naming the
    expert and tensor; `out` is then untouched.
    """
    operator = Operator.of(technique, params, "merge")
    derivation = Derivation(operator, _path(base), members_of(experts, ids, sha256), lineage)
    way = Way(Execution(threads, block, measure, device), rules, keep_limits, split)
    return streaming.merge_all(derivation, Out(Path(out), shard_bytes), way)


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
    operator = Operator.of(technique, params, "fold")
    derivation = Derivation(operator, _path(base), members_of([running, new], ids, sha256))
    way = Way(Execution(threads, block, measure, device), rules, keep_limits, split)
    return combine.combine(derivation, Out(Path(out), shard_bytes), way)


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
    rules: Rules = Rules(),
    threads: int = 1,
    block: int = BLOCK,
    measure: bool = True,
    device: str | None = None,
    keep_limits: Keep = False,
    shard_bytes: int | None = None,
) -> MergeReport:
    """Add one expert to a streaming merge: read `state_in` (None to start), write `state_out` and the merged model.

    `out` is byte-identical to what `merge` writes for all experts so far with the same ids; with `out=None` only the
    state is written. Cost does not depend on how many came before. Besides what `merge` raises: `TechniqueError` when the technique
    has no streaming form, the state belongs to another technique, parameters or base, or holds this id; `BrokenTie` when the experts
    so far hold two names as one tensor and this one does not.
    """
    derivation = _one(technique, params, base, expert, expert_id, sha256)
    way = Way(Execution(threads, block, measure, device), rules, keep_limits)
    states = States(_path(state_in), Path(state_out))
    return streaming.advance(derivation, states, out_of(out, shard_bytes), way)


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
    entry), to go on with. What is written equals a merge of those that stay up to rounding: see `engine/retraction.py`. Besides
    what `advance` raises: `TechniqueError` when the id is not in the state, `expert` is not what went in under it, or the
    technique cannot: largest values, and schedules that weigh by place (but for the newest expert).
    """
    derivation = _one(technique, params, base, expert, expert_id, sha256)
    way = Way(Execution(threads, block, measure), keep_limits=keep_limits)
    states = States(Path(state_in), Path(state_out))
    return streaming.retract(derivation, states, out_of(out, shard_bytes), way)


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
    rules: Rules = Rules(),
    threads: int = 1,
    block: int = BLOCK,
    measure: bool = True,
    keep_limits: Keep = False,
    shard_bytes: int | None = None,
) -> MergeReport:
    """`retract` of `old` and `advance` of `new` under the same id, which is then the newest; an explicit weight goes with it.

    `sha256` is that of `new`; `old` is hashed if the state records what it was. Options as of `advance`.
    """
    derivation = _one(technique, params, base, old, expert_id, None)
    arrival = Member(expert_id, Path(new), (sha256 or {}).get(expert_id))
    way = Way(Execution(threads, block, measure), rules, keep_limits)
    states = States(Path(state_in), Path(state_out))
    return streaming.replace(derivation, arrival, states, out_of(out, shard_bytes), way)


def _one(
    technique: str,
    params: Mapping[str, Any],
    base: PathLike,
    expert: PathLike,
    expert_id: str,
    sha256: Mapping[str, str] | None,
) -> Derivation:
    """The derivation of one arrival, or departure, of a stream."""
    operator = Operator.of(technique, params, "stream")
    return Derivation(operator, Path(base), members_of([expert], [expert_id], sha256))


def _path(path: PathLike | None) -> Path | None:
    return None if path is None else Path(path)
