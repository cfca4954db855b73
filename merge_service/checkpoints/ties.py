"""Tensors with several names, such as an output layer that shares its weights with the embedding.

Files express a tie in three ways, and all of them count:

- our metadata entry `tied`, {"alias": "name"} as JSON
- equal bytes under both names in every checkpoint of a merge, as `state_dict()` and most libraries write them
- an alias that one file leaves out and another holds as a copy, as Hugging Face writes them

The name that a file keeps differs as well: `save_pretrained` keeps the embedding; `safetensors.torch.save_model` keeps the first
by the alphabet and lists the others in its metadata. A tied tensor is merged, masked and counted once, and written under every
name that the reference holds.

Equal bytes are a tie only if dtype and shape are equal, and if the tensor is not constant in all checkpoints: norms of ones and
biases of zeros are equal because no training has changed them. An alias that is left out is found only among names outside stacks
of blocks.

Invariant: ties depend on the contents of all checkpoints of a merge, never on their order or paths.
"""

import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from merge_service.checkpoints.folders.heads import OUTPUT, is_source, shared_source, source_rank
from merge_service.checkpoints.weights import Weights
from merge_service.errors import IncompatibleCheckpoint, TechniqueError

Ties = Mapping[str, str]
"""The name that each alias stands for; such a name is never an alias itself."""
KEY = "tied"

_CHUNK = 1 << 20
_SAMPLE = 8


class BrokenTie(TechniqueError):
    """A stream holds two names as one tensor, and the newest expert holds two different tensors."""


def tie(reference: Weights, others: Sequence[Weights]) -> Ties:
    """The ties that hold in all of these checkpoints; afterwards every other checkpoint has each alias that the reference has.

    Raises `IncompatibleCheckpoint` for an invalid entry `tied` of the reference, and if only one checkpoint leaves out an output
    layer.
    """
    ties = dict(recorded(reference))
    groups = _equal(reference, [list(names) for names in _alike(reference, set(ties)).values()])
    varied = {id(group): not all(_is_constant(reference, name) for name in group[:1]) for group in groups}
    missing = {
        name: source
        for group in groups
        for name, source in _as_ties(group).items()
        if (varied[id(group)] or _is_output_bias(name, source)) and _is_outside(name) and _is_outside(source)
    }
    ours = _left_out(reference)
    for other in others:
        lend(other, {**ties, **missing, **ours, **_left_out(other, reference)})
        _name_alike(reference, other)
        _drop_copies(reference, other)
    take_apart(reference, [name for other in others for name in other.tensors])
    for other in others:
        _lend_declared(reference, other)
        _refuse_half_tied(reference, other)
        _refuse_half_tied(other, reference)
    found = [(group, varied[id(group)]) for group in groups]
    for other in others:
        found = [
            (part, varies or not _is_constant(other, part[0]))
            for group, varies in found
            for part in _equal(other, [[name for name in group if _fits(reference, other, name)]])
        ]
    further = {alias: name for group, varies in found if varies for alias, name in _as_ties(group).items()}
    return {alias: further.get(name, name) for alias, name in (ties | further).items()}


def lend(weights: Weights, ties: Ties) -> None:
    """Make these names readable in a checkpoint that left some of them out."""
    groups: dict[str, list[str]] = {}
    for alias, name in ties.items():
        groups.setdefault(name, [name]).append(alias)
    for group in groups.values():
        held = [weights.tensors[name] for name in group if name in weights.tensors]
        for name in group if held else ():
            if name not in weights.tensors:
                weights.lend(name, held[0])


def take_apart(reference: Weights, names: Iterable[str]) -> None:
    """Add an output layer that is among these names to a reference whose configuration ties it to the embedding."""
    source = shared_source(reference)
    for output in dict.fromkeys(names) if source else ():
        if OUTPUT.search(output) and output not in reference.tensors:
            reference.lend(output, reference.tensors[str(source)])


def recorded(checkpoint: Weights) -> Ties:
    """The ties that the metadata entry `tied` records, for tensors that the file holds.

    The older form, a list of groups of names, is read too. Raises `IncompatibleCheckpoint` for an invalid entry.
    """
    tensors = checkpoint.tensors
    try:
        entry = json.loads(checkpoint.metadata.get(KEY, "{}"))
        if isinstance(entry, list):
            groups = [[str(name) for name in group if name in tensors] for group in entry]
            return {alias: name for group in groups for alias, name in _as_ties(group).items()}
        found = {str(alias): str(name) for alias, name in entry.items() if alias in tensors}
    except (ValueError, AttributeError, TypeError):
        raise IncompatibleCheckpoint(
            f"{checkpoint.path}: its metadata entry 'tied' is not a JSON map of names"
        ) from None
    for alias, name in found.items():
        if name not in tensors or name in found:
            raise IncompatibleCheckpoint(
                f"{checkpoint.path}: {alias} is tied to {name}, which is not a tensor of its own"
            )
        if (tensors[alias].shape, tensors[alias].dtype) != (tensors[name].shape, tensors[name].dtype):
            raise IncompatibleCheckpoint(
                f"{checkpoint.path}: {alias} is tied to {name} but has another shape or dtype"
            )
    return found


def entry(ties: Ties) -> dict[str, str]:
    """The metadata entry that records these ties; empty without ties."""
    return {KEY: json.dumps(dict(ties))} if ties else {}


def of_groups(groups: Iterable[Sequence[str]]) -> Ties:
    """The ties of groups of names, each of which is one tensor."""
    return {alias: name for group in groups for alias, name in _as_ties(group).items()}


def check(checkpoint: Weights, ties: Ties, who: str) -> None:
    """Raise `IncompatibleCheckpoint` if tensors that must be equal differ in this checkpoint."""
    for alias, name in ties.items():
        if not _same(checkpoint, alias, name):
            raise IncompatibleCheckpoint(f"{who}: {alias} and {name} are tied in the base but differ here")


def keep(reference: Weights, newest: Weights, ties: Ties) -> Ties:
    """The ties of a stream that continues with another expert. Raises `BrokenTie` if the expert holds two tensors instead of one."""
    held = set(reference.tensors)
    lend(newest, ties)
    tie(reference, [newest])  # adds and drops aliases of the expert
    if further := reference.tensors.keys() - held:
        raise _broken(min(further), "its embedding", newest)
    for alias, name in ties.items():
        if {alias, name} <= newest.tensors.keys() and not _same(newest, alias, name):
            raise _broken(alias, name, newest)
    return ties


def _broken(alias: str, name: str, newest: Weights) -> BrokenTie:
    return BrokenTie(
        f"the experts so far hold {alias} and {name} as one tensor, {newest.path} as two; merge all experts at once, "
        "or start again without a state"
    )


def apart(reference: Weights, ties: Ties) -> tuple[str, str] | None:
    """An output layer and its embedding that are one tensor in the reference, and two in a merge with these ties."""
    for output in [name for name in reference.tensors if OUTPUT.search(name) and _is_outside(name)]:
        for source in [name for name in reference.tensors if is_source(name) and name != output]:
            one = ties.get(output, output) == ties.get(source, source)
            if not one and _same(reference, output, source) and not _is_constant(reference, source):
                return output, source
    return None


def _alike(weights: Weights, known: set[str]) -> dict[tuple[str, tuple[int, ...]], list[str]]:
    """Names of float tensors with more than one element, by dtype and shape, without the `known` aliases."""
    found: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, info in weights.tensors.items():
        if info.kind.is_float and info.numel > 1 and name not in known:
            found.setdefault((info.dtype, info.shape), []).append(name)
    return found


def _equal(weights: Weights, groups: Iterable[Sequence[str]]) -> list[list[str]]:
    """The parts of these groups, of at least two names, that hold equal bytes."""
    found: list[list[str]] = []
    for group in groups:
        parts: dict[bytes, list[list[str]]] = {}
        for name in group if len(group) > 1 else ():
            alike = parts.setdefault(_sample(weights, name), [])
            for part in alike:
                if _same(weights, part[0], name):
                    part.append(name)
                    break
            else:
                alike.append([name])
        found += [part for alike in parts.values() for part in alike if len(part) > 1]
    return found


def _sample(weights: Weights, name: str) -> bytes:
    size = weights.tensors[name].numel
    starts = (0, size // 3, size // 2, max(size - _SAMPLE, 0))
    return b"".join(weights.raw(name, start, start + _SAMPLE).tobytes() for start in starts)


def _same(weights: Weights, one: str, other: str) -> bool:
    """Whether two tensors hold the same bytes in the same form."""
    first, second = weights.tensors[one], weights.tensors[other]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    if (first.shard, first.offset) == (second.shard, second.offset):
        return True
    return all(
        weights.raw(one, start, start + _CHUNK).tobytes()
        == weights.raw(other, start, start + _CHUNK).tobytes()
        for start in range(0, first.numel, _CHUNK)
    )


def _is_constant(weights: Weights, name: str) -> bool:
    size, first = weights.tensors[name].numel, weights.raw(name, 0, 1)
    return all(
        bool(np.all(weights.raw(name, start, start + _CHUNK) == first)) for start in range(0, size, _CHUNK)
    )


def _left_out(weights: Weights, reference: Weights | None = None) -> dict[str, str]:
    """Names that a file left out for another, as recorded by `safetensors.torch.save_model`; only those of `reference`, if given."""
    said = {weights.renamed(alias): weights.renamed(name) for alias, name in weights.metadata.items()}
    held, known = weights.tensors, reference.tensors if reference is not None else said
    return {
        alias: name for alias, name in said.items() if alias not in held and name in held and alias in known
    }


def _name_alike(reference: Weights, other: Weights) -> None:
    """Rename the tensor that is both embedding and output layer to the name that the reference kept, if each file kept another."""
    for mine, theirs in ((is_source, OUTPUT.search), (OUTPUT.search, is_source)):
        lacking = [name for name in reference.tensors if name not in other.tensors and mine(name)]
        extra = [name for name in other.tensors if name not in reference.tensors and theirs(name)]
        fits = (
            len(lacking) == len(extra) == 1
            and reference.tensors[lacking[0]].shape == other.tensors[extra[0]].shape
        )
        if fits:
            other.lend(lacking[0], other.tensors.pop(extra[0]))


def _is_output_bias(alias: str, name: str) -> bool:
    """Whether both names are one bias in models like BERT; it is zero until it is trained."""
    return alias == f"{name.removesuffix('bias')}decoder.bias"


def _fits(reference: Weights, other: Weights, name: str) -> bool:
    return name in other.tensors and other.tensors[name].shape == reference.tensors[name].shape


def _is_outside(name: str) -> bool:
    return not any(part.isdigit() for part in name.split("."))


def _drop_copies(reference: Weights, other: Weights) -> None:
    """Drop tensors that the reference left out and that are copies of tensors it holds."""
    for alias in [name for name in other.tensors if name not in reference.tensors and _is_outside(name)]:
        info = other.tensors[alias]
        sources = [
            name
            for name, held in other.tensors.items()
            if held.shape == info.shape and name in reference.tensors and _is_outside(name)
        ]
        if info.numel == 1 or not info.kind.is_float:
            continue
        if _is_constant(other, alias):
            sources = [name for name in sources if _is_output_bias(alias, name)]
        if any(_same(other, alias, name) for name in sources):
            del other.tensors[alias]


def _lend_declared(reference: Weights, other: Weights) -> None:
    """Add an output layer that the reference holds to a checkpoint whose configuration says that its embedding is the output layer."""
    source = shared_source(other)
    for output in [name for name in reference.tensors if name not in other.tensors and OUTPUT.search(name)]:
        if source and other.tensors[source].shape == reference.tensors[output].shape:
            other.lend(output, other.tensors[source])


def _refuse_half_tied(one: Weights, other: Weights) -> None:
    """Raise `IncompatibleCheckpoint` if one checkpoint leaves out an output layer, as a tie, that the other trained separately."""
    for output in [name for name in other.tensors if name not in one.tensors and OUTPUT.search(name)]:
        for name, info in one.tensors.items():
            if is_source(name) and name in other.tensors and info.shape == other.tensors[output].shape:
                raise IncompatibleCheckpoint(
                    f"{other.path} holds {output} as a tensor of its own, {one.path} leaves it out, as models do that tie it to "
                    f"{name}; if that is so, write {one.path} with a copy of {name} under {output}, and merge again"
                )


def _as_ties(group: Sequence[str]) -> dict[str, str]:
    """The ties of a group. Its name is the one that files keep when they leave out others: an embedding, else the first."""
    if not group:
        return {}
    rank = [source_rank(name) for name in group]
    name = min(zip(rank, range(len(group)), group))[2]
    return {alias: name for alias in group if alias != name}
