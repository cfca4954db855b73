"""The inputs of a merge: opened, recognised, adapted to each other, checked for relation to the base, and named.

Invariant: every fault of an input is found here, before its bytes are hashed or a block is computed. An id that is not given is
derived from content, so neither paths nor the order of files affect a random mask.
"""

import contextlib
import importlib.metadata
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from merge_service.checkpoints import ties
from merge_service.checkpoints.adapters.adapted import Adapted
from merge_service.checkpoints.adapters.opening import Opened, open_weights
from merge_service.checkpoints.admission import align, check_tensors
from merge_service.checkpoints.relation import check_related
from merge_service.checkpoints.unmergeable import check_integers, check_mergeable
from merge_service.checkpoints.weights import Weights
from merge_service.engine.inputs import Inputs
from merge_service.engine.stream_state import MAX_EXPERTS
from merge_service.errors import CheckpointError, TechniqueError
from merge_service.merging.derivation import Derivation, Lineage, Operator, PathLike, Rules
from merge_service.techniques.params import nearest

ID_LENGTH = 12
"""Hexadecimal digits of an id that is derived from content."""


def check_count(derivation: Derivation) -> None:
    """Raise `TechniqueError` if a technique cannot merge this many experts, with these ids, with or without a base."""
    technique, params = derivation.operator.technique, derivation.operator.params
    base, experts, name = derivation.base, len(derivation.members), derivation.operator.technique.name
    if base is None:
        check_baseless(derivation.operator, "give the base (--base)")
    if experts == 0 and base is None:
        raise TechniqueError("there is nothing to merge: give experts, or a base")
    if technique.arity is not None and experts not in (0, technique.arity):
        raise TechniqueError(
            f"{name} merges exactly {technique.arity} checkpoints, not {experts}; fold them one by one, or use average"
        )
    if experts > MAX_EXPERTS:
        raise TechniqueError(f"at most {MAX_EXPERTS} experts can be merged at once, not {experts}")
    weights = params.get("weights")
    if weights is not None and len(weights) != experts:
        raise TechniqueError(f"{name}: weights has {len(weights)} entries but there are {experts} experts")
    density = params.get("density")
    if isinstance(density, list) and len(density) != experts:
        raise TechniqueError(f"{name}: density has {len(density)} entries but there are {experts} experts")
    for pattern, factors in (params.get("coefficients") or {}).items():
        if len(factors) != experts:
            raise TechniqueError(
                f"{name}: coefficients of {pattern!r} has {len(factors)} entries but there are {experts} experts"
            )
    given = [one for one in derivation.ids if one is not None]
    if len(set(given)) != len(given):
        twice = next(one for one in given if given.count(one) > 1)
        raise TechniqueError(f"the expert id {twice!r} is given twice; every expert counts once")


def check_baseless(operator: Operator, advice: str) -> None:
    """Raise `TechniqueError`, with what to do, if an operator needs a base."""
    technique, params = operator.technique, operator.params
    if technique.moves(params) or "base" in technique.needs:
        raise TechniqueError(f"{technique.name} merges differences from a base model; {advice}")
    if params.get("logit_scale") == "base":
        raise TechniqueError(f"{technique.name}: logit_scale = base needs the base; {advice}")


def check_patterns(derivation: Derivation, reference: Weights) -> None:
    """Raise `TechniqueError` for a pattern of `coefficients` that fits no tensor, which is most likely misspelled."""
    for pattern in derivation.operator.params.get("coefficients") or {}:
        if pattern not in reference.tensors and not any(
            fnmatchcase(one, pattern) for one in reference.tensors
        ):
            raise TechniqueError(
                f"{derivation.operator.technique.name}: the pattern {pattern!r} of coefficients fits no tensor of {reference.path}"
                f"{nearest(pattern, reference.tensors)}; correct it, or take it out"
            )


def open_all(
    stack: contextlib.ExitStack, base: PathLike | None, experts: Sequence[PathLike], rules: Rules
) -> tuple[Opened | None, list[Opened]]:
    """The base and the experts, open as long as `stack`; adapters are read on the base if they name none. Raises `CheckpointError` if no name has the prefix to strip."""
    anchor = stack.enter_context(open_weights(base)) if base is not None else None
    opened = [stack.enter_context(open_weights(path, base)) for path in experts]
    strip([*([anchor] if anchor else []), *opened], rules)
    return anchor, opened


def strip(every: Sequence[Weights], rules: Rules) -> None:
    """Remove the prefix of the rules, if there is one, from all names. Raises `CheckpointError` if no name has it."""
    if rules.strip_prefix and not sum([weights.rename(rules.strip_prefix, "") for weights in every]):
        first = next(iter(every[0].tensors), "none")
        raise CheckpointError(
            f"no tensor name begins with the prefix {rules.strip_prefix!r} that is to be stripped; {every[0].path} has {first!r}"
        )


def check_inputs(
    base: Weights | None,
    experts: Sequence[Weights],
    names: Sequence[str],
    rules: Rules,
    exempt: int | None = None,
    known: ties.Ties | None = None,
) -> tuple[tuple[str, ...], ties.Ties]:
    """Raise the `CheckpointError` that fits for the first input that cannot be merged with the others; returns notes, and the
    ties that hold in all of them.

    Without a base, experts must fit the first of them. `exempt` is the index of an input that need not be related to the base.
    `known` are the ties of a stream that continues with this expert.
    """
    reference = base or experts[0]
    if base is not None:
        check_mergeable(base, "the base")
    for who, weights in zip(names, experts):
        check_mergeable(weights, who)
    others = [
        (number, who, one) for number, (who, one) in enumerate(zip(names, experts)) if one is not reference
    ]
    notes = [note for weights in experts if isinstance(weights, Adapted) for note in weights.notes]
    notes += [note for _, who, weights in others for note in align(reference, weights, who)]
    weights_of = [weights for _, _, weights in others]
    tied = ties.tie(reference, weights_of) if known is None else ties.keep(reference, experts[0], known)
    ties.check(reference, tied, str(reference.path))
    for number, who, weights in others:
        check_tensors(reference, weights, who)
        ties.check(weights, tied, who)
        notes += check_integers(reference, weights, who)
        if not rules.any_base and number != exempt:
            check_related(
                reference, weights, who, "the base" if base is not None else "the base of the first expert"
            )
    return tuple(notes), tied


def by_content(
    base: Weights | None, experts: Sequence[Weights], ids: Sequence[str | None], threads: int
) -> Lineage:
    """Every input by file and sha256; inputs without an id are named by their tensors. Reads all bytes once, on threads.

    Experts of equal content are numbered (NAME-2, ...), and the notes say so. Raises `TechniqueError` for an id that is given
    twice.
    """
    every = [*experts, *([base] if base is not None else [])]
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda weights: weights.digests(), every))
    seen: Counter[str] = Counter()
    entries, notes, first = [], [], dict[str, Path]()
    for weights, (content, sha256), name in zip(experts, found, ids):
        known = name if name is not None else content[:ID_LENGTH]
        seen[known] += 1
        if seen[known] > 1:
            if name is not None:
                raise TechniqueError(f"the expert id {name!r} is given twice; every expert counts once")
            notes.append(f"{weights.path} and {first[known]} hold the same tensors; both count")
            known = f"{known}-{seen[known]}"
        first.setdefault(known, weights.path)
        entries.append({"id": known, "file": weights.path.name, "sha256": sha256})
    about: dict[str, Any] = {"versions": versions()}
    if base is not None:
        about["base"] = {"file": base.path.name, "sha256": found[-1][1]}
    return Lineage(Inputs.of(entries), about, tuple(notes))


def shown(opened: Sequence[Weights], ids: Sequence[str | None]) -> list[str]:
    """The names of inputs in messages: the id, or the file's name, with its directory if several files have the same name."""
    names = Counter(weights.path.name for weights in opened)
    files = ("/".join(weights.path.parts[-2 if names[weights.path.name] > 1 else -1 :]) for weights in opened)
    return [file if name is None else name for name, file in zip(ids, files)]


def versions() -> dict[str, str]:
    """Versions of the software that computes a merge."""
    return {"numpy": np.__version__, "temporal-merge": importlib.metadata.version("temporal-merge")}
