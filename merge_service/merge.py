"""Merging checkpoints: all at once, one into a running model, or as a stream with a state.

    merge     all experts, in their order
    fold      a running model and one new expert (TIME's EMA)
    advance   one more expert into a streaming state; the merged model is bit-identical to `merge` of all of them
    retract   one expert out of the state again
    replace   one expert of the state for another

Each function validates everything it can before a block is computed, writes the output once, and publishes it only when it
is complete. Memory is a few blocks per thread, for any number of experts. Each builds the values of
`merge_service.merging.derivation` and passes them on.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_service.checkpoints.views.cast import written
from merge_service.engine.assembly import Execution
from merge_service.engine.split import Split
from merge_service.engine.thresholds_cache import Keep
from merge_service.errors import TechniqueError
from merge_service.merging import combine, resuming, streaming
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
from merge_service.moved import renamed

__all__ = ["MergeReport", "advance", "fold", "merge", "replace", "retract"]


@renamed(keep_limits="keep_thresholds")
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
    block: int | None = None,
    measure: bool = True,
    device: str | None = None,
    split: Split | None = None,
    keep_thresholds: Keep = False,
    shard_bytes: int | None = None,
    statistics: Sequence[PathLike | None] | None = None,
    dtype: str | None = None,
    texts: Mapping[str, str] | None = None,
) -> MergeReport:
    """Merge `experts` (files, sharded indices or directories), in this order, into `out`.

    `out` is a .safetensors file, or a directory when an input is in a directory with a configuration: that of open_clip, which
    is copied, or of a Hugging Face library, whose tokenizer, preprocessors and code are copied too, beside `texts`, further
    files by name. `dtype` (float32, bfloat16, ...) is that of the floats in the output, by default the base's; they are rounded
    to it once. With `shard_bytes` a model of more bytes goes to NAME-00001-of-0000N.safetensors beside NAME.safetensors and
    NAME.safetensors.index.json (`shards.py`), to which the report's `out` then points; an `out` of that index name asks
    for it at any size. The output has the tensors, dtypes and metadata of the base (of the first expert without one), plus an
    entry `temporal_merge` that says how it was made. Without experts it is the base.

    `ids` name experts and seed their random masks; an id of None is derived from the tensors' content. With `lineage`, or when
    an id is None, the output names file and sha256 of every input and the versions of the software; else it has `sha256` by id
    as given. `rules` say which inputs are accepted. `measure=False` saves computing `merged_norm`. `split` divides the work over
    processes. `keep_thresholds` keeps computed thresholds (`thresholds_cache.py`); kept ones are always used. `statistics` are the files of
    what was measured of each expert, for techniques that need it; by default EXPERT.KIND.safetensors beside the expert.

    Raises `TechniqueError` (technique, parameters, number of experts), or the kind of `CheckpointError` that fits, naming the
    expert and tensor; `out` is then unchanged.
    """
    operator = Operator.of(technique, params, "merge")
    members = members_of(experts, ids, sha256, statistics)
    derivation = Derivation(operator, _path(base), members, lineage)
    way = Way(Execution(threads, block, measure, device), rules, keep_thresholds, split)
    there = Out(Path(out), shard_bytes, dtype=written(dtype) if dtype else None, texts=texts or {})
    return streaming.merge_all(derivation, there, way)


@renamed(keep_limits="keep_thresholds")
def fold(
    technique: str,
    params: Mapping[str, Any],
    base: PathLike | None,
    running: PathLike,
    new: PathLike,
    out: PathLike,
    *,
    ids: tuple[str, str] | None = None,
    sha256: Mapping[str, str] | None = None,
    rules: Rules = Rules(),
    threads: int = 1,
    block: int | None = None,
    measure: bool = True,
    device: str | None = None,
    split: Split | None = None,
    keep_thresholds: Keep = False,
    shard_bytes: int | None = None,
    statistics: Sequence[PathLike | None] | None = None,
    state_out: PathLike | None = None,
) -> MergeReport:
    """Merge the newest expert into the running model: one step of TIME's EMA, f({running, new}; base).

    A different operator from `merge` of all experts, except for running means. Arguments and errors as `merge`.

    Techniques with sufficient statistics (fisher, regmean, lot, wudi) fold these: `running` is the first expert, or what the previous
    fold wrote, whose state lies beside it (or that state itself). The new state goes to `state_out`, by default
    NAME.state.safetensors beside `out`. A merged model without its state is refused. There `ids` are by default derived from
    content, because each expert counts once; elsewhere they are "running" and "new".
    """
    operator = Operator.of(technique, params, "fold")
    way = Way(Execution(threads, block, measure, device), rules, keep_thresholds, split)
    if operator.technique.resumes:
        members = members_of([running, new], ids, sha256, statistics)
        return resuming.resume(
            Derivation(operator, _path(base), members), Out(Path(out), shard_bytes), way, _path(state_out)
        )
    if state_out is not None:
        raise TechniqueError(f"{operator.technique.name} folds without a state; leave state_out out")
    members = members_of([running, new], ids or ("running", "new"), sha256, statistics)
    derivation = Derivation(operator, _path(base), members)
    return combine.combine(derivation, Out(Path(out), shard_bytes), way)


@renamed(keep_limits="keep_thresholds")
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
    block: int | None = None,
    measure: bool = True,
    device: str | None = None,
    keep_thresholds: Keep = False,
    shard_bytes: int | None = None,
    statistics: PathLike | None = None,
) -> MergeReport:
    """Add one expert to a streaming merge: read `state_in` (None to start), write `state_out` and the merged model.

    `out` is byte-identical to what `merge` writes for all experts so far with the same ids; with `out=None` only the
    state is written. The cost does not depend on the number of earlier experts. Besides what `merge` raises: `TechniqueError`
    when the technique has no streaming form, or the state belongs to another technique, parameters or base, or holds this id;
    `BrokenTie` when the experts so far hold two names as one tensor and this one does not.
    """
    derivation = _one(technique, params, base, expert, expert_id, sha256)
    if statistics is not None:
        member = dataclasses.replace(derivation.members[0], statistics=Path(statistics))
        derivation = dataclasses.replace(derivation, members=(member,))
    way = Way(Execution(threads, block, measure, device), rules, keep_thresholds)
    states = States(_path(state_in), Path(state_out))
    return streaming.advance(derivation, states, out_of(out, shard_bytes), way)


@renamed(keep_limits="keep_thresholds")
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
    block: int | None = None,
    measure: bool = True,
    keep_thresholds: Keep = False,
    shard_bytes: int | None = None,
) -> MergeReport:
    """Take one expert out of a streaming merge: read `state_in` and the expert, write `state_out` and the merged model.

    `params` are those of the state; the report holds those of the remaining experts (explicit weights lose one entry), for the
    next call. The result equals a merge of the remaining experts up to rounding: see `engine/retraction.py`. Besides what
    `advance` raises: `TechniqueError` when the id is not in the state, `expert` is not the one that was added under it, or the
    technique does not allow it: largest values, and schedules, except for the newest expert.
    """
    derivation = _one(technique, params, base, expert, expert_id, sha256)
    way = Way(Execution(threads, block, measure), keep_thresholds=keep_thresholds)
    states = States(Path(state_in), Path(state_out))
    return streaming.retract(derivation, states, out_of(out, shard_bytes), way)


@renamed(keep_limits="keep_thresholds")
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
    block: int | None = None,
    measure: bool = True,
    keep_thresholds: Keep = False,
    shard_bytes: int | None = None,
) -> MergeReport:
    """`retract` of `old` and `advance` of `new` under the same id, which is then the newest; an explicit weight moves with it.

    `sha256` is that of `new`; `old` is hashed if the state records its sha256. Options as of `advance`.
    """
    derivation = _one(technique, params, base, old, expert_id, None)
    arrival = Member(expert_id, Path(new), (sha256 or {}).get(expert_id))
    way = Way(Execution(threads, block, measure), rules, keep_thresholds)
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
    """The derivation of one arrival or removal in a stream."""
    operator = Operator.of(technique, params, "stream")
    return Derivation(operator, Path(base), members_of([expert], [expert_id], sha256))


def _path(path: PathLike | None) -> Path | None:
    return None if path is None else Path(path)
