"""Opens what a path means: a checkpoint, or an adapter on its base.

The base of an adapter is the one that the user names (BASE+ADAPTER), else the base of the merge, else the path in the adapter's own
configuration.

Invariant: every fault of an adapter is found here, before a number is computed.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from merge_service.checkpoints.adapters import names
from merge_service.checkpoints.adapters.adapted import Adapted
from merge_service.checkpoints.adapters.configuration import AdapterConfig
from merge_service.checkpoints.adapters.names import Named, Parts
from merge_service.checkpoints.adapters.references import Reference, folder_of, is_adapter
from merge_service.checkpoints.adapters.updates import Copy, Dora, Factor, Form, LowRank, Patch, Update
from merge_service.checkpoints.checkpoint import Checkpoint
from merge_service.checkpoints.folders.heads import OUTPUT, head_of, shared_source
from merge_service.checkpoints.folders.kinds import ADAPTER, ADAPTER_CONFIG
from merge_service.checkpoints.ties import recorded
from merge_service.checkpoints.unmergeable import check_mergeable
from merge_service.checkpoints.weights import Weights
from merge_service.errors import AdapterCheckpoint, CheckpointError, ForeignCheckpoint, IncompatibleCheckpoint


class Opened(Weights, Protocol):
    """`Weights` that are open as long as a `with` block."""

    def close(self) -> None:
        """Release the files."""

    def __enter__(self) -> "Opened": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_weights(path: Path | str, base: Path | str | None = None) -> Opened:
    """The weights behind a path, a context manager; `base` is that of the merge, for adapters that name none.

    Raises what `Checkpoint.open` does; for an adapter `AdapterCheckpoint` or `IncompatibleCheckpoint` naming it, the module and why.
    """
    found = Reference.of(path)
    return Checkpoint.open(path) if found is None else open_adapter(found, base)


def open_adapter(found: Reference, base: Path | str | None = None) -> Adapted:
    """The model that an adapter makes of its base, a context manager, as of `open_weights`."""
    notes: list[str] = []
    place = _base_of(found, base, notes)
    under = open_weights(place)
    try:
        check_mergeable(under, f"the base of {found.adapter}")
        adapter = Checkpoint.open(_file(found.adapter))
        try:
            updates = _Reading(under, adapter, notes).updates()
        except BaseException:
            adapter.close()
            raise
        return Adapted(under, adapter, updates, Reference(found.adapter, Path(place)).text, tuple(notes))
    except BaseException:
        under.close()
        raise


def _base_of(found: Reference, base: Path | str | None, notes: list[str]) -> Path | str:
    """The base of an adapter. Raises `AdapterCheckpoint` if there is none, or if two are named that differ."""
    if found.base is not None:
        return found.base
    own = found.own_base
    if base is None and own is None:
        said = f", its configuration names {found.stated!r}, which is no path here" if found.stated else ""
        raise AdapterCheckpoint(
            f"{found.adapter} is an adapter{said}: give its base, BASE+{found.adapter} (or --base for all)"
        )
    if base is None:
        assert own is not None
        return own
    if own is not None and not _alike(own, base):
        raise AdapterCheckpoint(
            f"{found.adapter} says that its base is {own}, which is not {base}; give that as the base, or name the right one: "
            f"BASE+{found.adapter}"
        )
    if own is None and found.stated:
        notes.append(f"{found.adapter} is read on {base}; its configuration names {found.stated!r}")
    return base


def _alike(own: Path, base: Path | str) -> bool:
    with open_weights(own) as one, open_weights(base) as other:
        return one.fingerprint() == other.fingerprint()


def adapter_files(path: Path) -> list[Path]:
    """The configuration and the weights of an adapter's folder; none for another path. Raises what `open_weights` does for a folder
    without weights."""
    return [folder_of(path) / ADAPTER_CONFIG, _file(path)] if path.exists() and is_adapter(path) else []


def _file(adapter: Path) -> Path:
    """The weights of an adapter. Raises `ForeignCheckpoint` for a pickle, saying how it is converted."""
    if not adapter.is_dir():
        return adapter
    for suffix in (".safetensors", ".safetensors.index.json"):
        if (adapter / f"{ADAPTER}{suffix}").is_file():
            return adapter / f"{ADAPTER}{suffix}"
    if (adapter / f"{ADAPTER}.bin").is_file():
        raise ForeignCheckpoint(
            f"{adapter} holds {ADAPTER}.bin, a pickle of torch, which is never loaded here because it can run code; "
            f"`temporal-merge convert {adapter} OUT` takes the tensors out of it and runs nothing"
        )
    raise CheckpointError(f"{adapter} has an {ADAPTER_CONFIG} but no {ADAPTER}.safetensors")


@dataclass
class _Reading:
    """One adapter while it is read on its base."""

    base: Weights
    adapter: Checkpoint
    notes: list[str]

    def updates(self) -> dict[str, Update]:
        """The update of every tensor that the adapter changes, by the base's name."""
        path = self.adapter.path
        beside = folder_of(path) / ADAPTER_CONFIG
        config = AdapterConfig.read(beside) if beside.is_file() else None
        if config is None:
            named = names.kohya(self.adapter.tensors, self.base.tensors, path, self.notes)
        else:
            found = names.peft(self.adapter.tensors, path)
            self._take_apart(found)
            named = self._placed(found)
            if any(name.endswith("base_layer.out_proj.lora_A.weight") for name in self.adapter.tensors):
                self.notes.append(
                    f"{path.parent.name}: the update of out_proj is added once, as LoRA defines it; peft up to 0.21.2 added it twice"
                )
        made: dict[str, Update] = {}
        for target, copy in named.copies.items():
            made[target] = self._copy(target, copy)
        for module, parts in named.modules.items():
            for target, update in self._adapted(module, parts, config):
                if target in made:
                    self._same_as_base(target, made[target])
                made[target] = update
        if not made:
            raise AdapterCheckpoint(f"{path} holds no tensors")
        return self._with_aliases(made)

    def _take_apart(self, named: Named) -> None:
        """Give the base an output layer of its own if it is tied to the embedding and the adapter changes either of them alone.

        While such an adapter is trained, only the module that it names has its update; `merge_and_unload` of peft changes both.
        Rows of tokens (`trainable_token_indices`) are the exception: peft trains them in both. Raises `AdapterCheckpoint` if the
        output layer has no known name.
        """
        source = shared_source(self.base)
        if source is None:
            return
        changed = {
            *named.copies,
            *(f"{one}.weight" for one in named.modules if "tokens" not in named.modules[one].roles),
        }
        outputs = [one for one in changed if OUTPUT.search(one) and one not in self.base.tensors]
        if source not in changed and not outputs:
            return
        output = outputs[0] if outputs else head_of(self.base)
        if output is None:
            raise AdapterCheckpoint(
                f"{self.adapter.path} changes {source} alone, which is also the output layer of {self.base.path}, and what that is called is "
                "not known here; save the base with an output layer of its own (tie_word_embeddings: false), or merge in peft"
            )
        self.base.lend(output, self.base.tensors[source])
        which = (
            "both, each by its own part"
            if outputs and source in changed
            else f"{output if outputs else source} alone"
        )
        self.notes.append(
            f"{folder_of(self.adapter.path).name}: the base ties {output} to {source}, the adapter changes {which}, as when it was trained; "
            "peft's merge_and_unload would change the one tensor"
        )

    def _placed(self, named: Named) -> Named:
        """The parts by the base's names. Raises `IncompatibleCheckpoint` naming a module that the base lacks."""
        places = names.prefix_between([*named.modules, *named.copies], self.base.tensors)
        if places is None:
            places = names.prefix_between(list(named.modules), self.base.tensors)
        if places is None:
            known = {name.rpartition(".")[0] for name in self.base.tensors} | set(self.base.tensors)
            lacking = next(one for one in named.modules if one not in known)
            raise IncompatibleCheckpoint(
                f"{self.adapter.path} adapts {lacking}, which is no module of {self.base.path}: it belongs to another base"
            )
        old, new = places
        if old or new:
            what = f"without {old!r}" if old else f"with {new!r}"
            self.notes.append(
                f"{self.adapter.path.parent.name}: its names were read {what} before them, as the base's are"
            )
        return Named(
            {new + one.removeprefix(old): parts for one, parts in named.modules.items()},
            {new + one.removeprefix(old): name for one, name in named.copies.items()},
        )

    def _adapted(self, module: str, parts: Parts, config: AdapterConfig | None) -> list[tuple[str, Update]]:
        """The updates of a module's weight and bias. Raises `IncompatibleCheckpoint` for factors that do not fit it."""
        target, roles = self._weight_of(module), dict(parts.roles)
        found: list[tuple[str, Update]] = []
        if "tokens" in roles:
            if len(roles) > 1:
                raise AdapterCheckpoint(
                    f"{self.adapter.path} adapts {module} and trains single rows of it; this is not known here"
                )
            return [(target, self._patch(module, target, roles["tokens"], config))]
        if not {"A", "B"} <= roles.keys():
            lacking = "B" if "A" in roles else "A"
            raise AdapterCheckpoint(f"{self.adapter.path}: the factor {lacking} of {module} is missing")
        rank = self._rank(module, parts, config)
        if config is None:
            alpha = float(self.adapter.read(roles["alpha"])[0]) if "alpha" in roles else float(rank)
            scale = alpha / rank
        else:
            scale = config.scale_of(module, rank)
        transposed = parts.embedding or self._is_transposed(module, target, parts, config)
        inner = self._low_rank(module, target, (roles["A"], roles["B"], rank), scale, transposed)
        magnitude = roles.get("magnitude")
        if config is not None and config.dora != (magnitude is not None):
            raise AdapterCheckpoint(
                f"{self.adapter.path}: use_dora is {config.dora}, but {module} has {'a' if magnitude else 'no'} magnitude"
            )
        if magnitude is None:
            found.append((target, inner))
        else:
            size = inner.shape[1 if transposed else 0]
            self._expect(magnitude, size, f"the magnitudes of {module}")
            found.append((target, Dora(inner, self._vector(magnitude), not transposed)))
        if "bias" in roles:
            found.append(self._bias(module, target, roles["bias"], scale))
        return found

    def _weight_of(self, module: str) -> str:
        tensors = self.base.tensors
        for name in (f"{module}.weight", f"{module}.in_proj_weight", module):
            if name in tensors:
                return name
        raise IncompatibleCheckpoint(
            f"{self.adapter.path} adapts {module}, which has no weight in {self.base.path}: it belongs to another base"
        )

    def _rank(self, module: str, parts: Parts, config: AdapterConfig | None) -> int:
        """The rank of the factors in the file, which must be that of the configuration."""
        rank = self.adapter.tensors[parts.roles["A"]].shape[:1]
        if config is not None and rank != (config.rank_of(module),):
            raise AdapterCheckpoint(
                f"{self.adapter.path}: the factors of {module} have the rank {rank[0] if rank else 'of a scalar'}, the configuration says "
                f"{config.rank_of(module)}"
            )
        if not rank or rank[0] < 1:
            raise AdapterCheckpoint(f"{self.adapter.path}: the factors of {module} have no rank")
        return rank[0]

    def _is_transposed(self, module: str, target: str, parts: Parts, config: AdapterConfig | None) -> bool:
        """Whether the base stores the matrix as [in, out], as GPT-2 does: shapes decide, and where both fit, the configuration."""
        want = self.base.tensors[target].shape
        size_in = self.adapter.tensors[parts.roles["A"]].shape[1:]
        size_out = self.adapter.tensors[parts.roles["B"]].shape[:1]
        fits, turned = want == (*size_out, *size_in), want == (*size_in, *size_out)
        if not (fits or turned):
            raise IncompatibleCheckpoint(
                f"{self.adapter.path}: {module} has the shape {list(want)} in {self.base.path}, but the factors are for "
                f"{[*size_out, *size_in]}: the adapter belongs to another base"
            )
        attention = f"{module.rpartition('.')[0]}.in_proj_weight" in self.base.tensors
        return turned and (not fits or (config is not None and config.transposed and not attention))

    def _low_rank(
        self, module: str, target: str, factors: tuple[str, str, int], scale: float, transposed: bool
    ) -> LowRank:
        down, up, rank = factors
        want, held = self.base.tensors[target].shape, self.adapter.tensors
        rows, columns = want[0], prod(want[1:])
        inner, outer = (rows, columns) if transposed else (columns, rows)
        if (held[down].numel, held[up].numel, held[up].shape[1]) != (rank * inner, outer * rank, rank):
            raise IncompatibleCheckpoint(
                f"{self.adapter.path}: the factors of {module}, {list(held[up].shape)} and {list(held[down].shape)}, do not fit its shape "
                f"{list(want)} in {self.base.path}"
            )
        first, second = self._matrix(down, rank, inner), self._matrix(up, outer, rank)
        if transposed:
            form: Form = "embedding" if "lora_embedding_" in down else "transposed"
            return LowRank((rows, columns), _turned(first), _turned(second), scale, form)
        return LowRank((rows, columns), second, first, scale)

    def _bias(self, module: str, target: str, name: str, scale: float) -> tuple[str, Update]:
        """The update of a module's bias by that of the second factor (`lora_bias`)."""
        bias = f"{module}.in_proj_bias" if target.endswith("in_proj_weight") else f"{module}.bias"
        if bias not in self.base.tensors:
            raise IncompatibleCheckpoint(
                f"{self.adapter.path} has a bias for {module}, which has none in {self.base.path}"
            )
        size = self.base.tensors[bias].numel
        self._expect(name, size, f"the bias of {module}")
        return bias, LowRank(
            (size, 1), self._matrix(name, size, 1), lambda: np.ones((1, 1), np.float32), scale
        )

    def _patch(self, module: str, target: str, name: str, config: AdapterConfig | None) -> Patch:
        tokens = config.tokens if config else {}
        at = next((rows for key, rows in tokens.items() if not key or f".{module}".endswith(f".{key}")), ())
        want, held = self.base.tensors[target].shape, self.adapter.tensors[name].shape
        if held != (len(at), *want[1:]) or any(not 0 <= row < want[0] for row in at):
            raise IncompatibleCheckpoint(
                f"{self.adapter.path}: {name} has the shape {list(held)} for {len(at)} tokens of {module}, which has {list(want)}"
            )
        columns = prod(want[1:])
        return Patch((want[0], columns), at, self._matrix(name, len(at), columns))

    def _copy(self, target: str, name: str) -> Copy:
        held, want = self.adapter.tensors[name], self.base.tensors.get(target)
        if want is not None and want.shape != held.shape:
            raise IncompatibleCheckpoint(
                f"{self.adapter.path} replaces {target} by one of shape {list(held.shape)}; {self.base.path} has {list(want.shape)}. "
                "If tokens were added, resize the base first"
            )
        columns = max(1, prod(held.shape[1:])) if held.shape else 1

        def read(first: int, last: int) -> np.ndarray:
            return self.adapter.read(name, first * columns, last * columns).reshape(-1, columns)

        return Copy((held.shape[0] if held.shape else 1, columns), read)

    def _same_as_base(self, target: str, copy: Update) -> None:
        """Raise `AdapterCheckpoint` unless a copy beside factors is that of the base, as peft saves embeddings."""
        rows, columns = copy.shape
        for first in range(0, rows, 4096):
            last = min(first + 4096, rows)
            ours = self.base.read(target, first * columns, last * columns).reshape(-1, columns)
            if not isinstance(copy, Copy) or not np.array_equal(ours, copy.read(first, last)):
                raise AdapterCheckpoint(
                    f"{self.adapter.path} holds factors for {target} and a copy of it that differs from {self.base.path}'s: it belongs to "
                    "another base"
                )

    def _with_aliases(self, made: dict[str, Update]) -> dict[str, Update]:
        """With the other names of tied tensors, which the base holds as one."""
        for alias, name in recorded(self.base).items():
            one = made.get(name) or made.get(alias)
            if one is not None:
                made.setdefault(alias, one)
                made.setdefault(name, one)
        return made

    def _expect(self, name: str, size: int, what: str) -> None:
        if self.adapter.tensors[name].numel != size:
            raise IncompatibleCheckpoint(
                f"{self.adapter.path}: {what} are {self.adapter.tensors[name].numel} numbers, not {size}"
            )

    def _matrix(self, name: str, rows: int, columns: int) -> Factor:
        return lambda: self.adapter.read(name).reshape(rows, columns)

    def _vector(self, name: str) -> Factor:
        return lambda: self.adapter.read(name).reshape(-1)


def _turned(factor: Factor) -> Factor:
    return lambda: factor().T
