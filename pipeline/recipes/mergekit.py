"""mergekit's YAML, checked and translated into our recipes, as mergekit 0.1.5 reads it (arXiv 2403.13257).

A parameter is looked for at the model, then the slice, the module, and the whole; here the rules of all four are put one after
another at the model, which gives the same values.

Invariant: what is translated gives mergekit's numbers up to rounding and ties at thresholds; anything else is refused by name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline.errors import ConfigError
from pipeline.recipes.methods import METHODS, PARAMETERS, REFUSED, Method, Spoken
from pipeline.recipes.model import Expert, Merge, Module, Slice, Vocabulary
from pipeline.recipes.settings import Setting, chained, rules, written
from pipeline.study.mistakes import nearest, validate

Params = Mapping[str, Any]
Level = Mapping[str, Any]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Part):
    """A model in `models`, or in the `sources` of a slice, where it has a layer range."""

    model: str | Mapping[str, Any]
    layer_range: tuple[int, int] | None = None
    parameters: Params | None = None


class OutputSlice(_Part):
    """An entry of `slices`."""

    sources: tuple[Source, ...]
    base_model: str | Mapping[str, Any] | None = None
    residual_weight: float | None = None
    parameters: Params | None = None


class OutputModule(_Part):
    """An entry of `modules`."""

    models: tuple[Source, ...] | None = None
    slices: tuple[OutputSlice, ...] | None = None
    parameters: Params | None = None


class Document(_Part):
    """One document of mergekit's YAML; `name` is that of mergekit-multi."""

    merge_method: str
    name: str | None = None
    base_model: str | Mapping[str, Any] | None = None
    models: tuple[Source, ...] | None = None
    slices: tuple[OutputSlice, ...] | None = None
    modules: Mapping[str, OutputModule] | None = None
    parameters: Params | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | Mapping[str, Any] | None = None
    tokenizer: Mapping[str, Any] | None = None
    chat_template: str | None = None


def translate(raw: Mapping[str, Any], where: str) -> tuple[Merge, list[str]]:
    """One document as a merge of ours, and what the user should know. Raises ConfigError with what cannot be done and why."""
    document, problems = validate(Document, dict(raw))
    if document is None:
        raise ConfigError([f"{where}: {problem.key}: {problem.text}" for problem in problems])
    try:
        return _Translation(document, where).merge()
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: {error}") from None


class _Translation:
    """The translation of one document."""

    def __init__(self, document: Document, where: str) -> None:
        self.document, self.where, self.notes = document, where, list[str]()
        self.method = self._method(document.merge_method)
        self.base = _path(document.base_model) if document.base_model is not None else None

    def merge(self) -> tuple[Merge, list[str]]:
        found = self.document
        given = [name for name in ("models", "slices", "modules") if getattr(found, name)]
        if len(given) != 1:
            raise ValueError("needs exactly one of models, slices and modules")
        top = self._level(found.parameters, "parameters")
        made: dict[str, Any] = {"technique": self.method.technique, "parameters": {}}
        if found.models:
            made["experts"], made["base"], own = self._models(found.models, [top])
            made["parameters"] = own
        elif found.slices:
            made["slices"] = tuple(self._slice(one, at, [top]) for at, one in enumerate(found.slices))
        else:
            made["modules"] = {
                name: self._module(name, one, top) for name, one in (found.modules or {}).items()
            }
            made["base"] = self.base if self.method.moves or self.method.keeps_base else None
        made["dtype"] = found.out_dtype or found.dtype
        made["tokenizer"] = self._tokenizer()
        made["chat_template"] = found.chat_template
        made["name"] = found.name
        if found.dtype not in (None, "float32", "float64"):
            self.notes.append(
                f"dtype {found.dtype}: inputs are read as they are stored, sums are float32, and the result is rounded to it once "
                "(mergekit rounds the inputs first)"
            )
        return Merge.model_validate(made), self.notes

    def _method(self, name: str) -> Method:
        if name in REFUSED:
            raise ConfigError(f"{self.where}: merge_method {name}: {REFUSED[name]}")
        if name not in METHODS:
            raise ConfigError(
                f"{self.where}: merge_method {name!r} is not known{nearest(name, METHODS)}; known are {', '.join(METHODS)}"
            )
        return METHODS[name]

    def _level(self, params: Params | None, key: str) -> Level:
        """The parameters of one level, checked. Raises ValueError for an unknown name or a value that is no setting."""
        for name, value in (params or {}).items():
            if name not in PARAMETERS:
                raise ValueError(f"{key}.{name} is no parameter of mergekit{nearest(name, PARAMETERS)}")
            try:
                rules(value)
            except ValueError as error:
                raise ValueError(f"{key}.{name} {error}") from None
            if name not in self.method.knows:
                self.notes.append(f"{key}.{name} has no effect in {self.document.merge_method}")
        return {name: value for name, value in (params or {}).items() if name in self.method.knows}

    def _models(
        self, sources: Sequence[Source], levels: Sequence[Level]
    ) -> tuple[tuple[Expert, ...], str | None, dict[str, Setting]]:
        """The experts, the base, and the parameters that all experts share, of whole models."""
        ranged = next((one for one in sources if one.layer_range is not None), None)
        if ranged is not None:
            raise ValueError(f"models: {_path(ranged.model)} has a layer_range, which belongs into slices")
        listed = list(sources)
        if self.base is not None and self.base not in [_path(one.model) for one in listed]:
            listed.append(Source(model=self.base))
        experts, base, own = self._spoken(listed, levels, self.base)
        return experts, base.model if base else None, own

    def _slice(self, piece: OutputSlice, at: int, levels: Sequence[Level]) -> Slice:
        if piece.residual_weight is not None:
            raise ValueError(
                f"slices[{at}].residual_weight has no meaning in mergekit 0.1.5 and none here; remove it"
            )
        level = self._level(piece.parameters, f"slices[{at}].parameters")
        base = _path(piece.base_model) if piece.base_model is not None else self.base
        for one in piece.sources:
            if one.layer_range is None:
                raise ValueError(f"slices[{at}]: {_path(one.model)} has no layer_range")
        experts, anchor, own = self._spoken(piece.sources, [level, *levels], base)
        return Slice(experts=experts, base=anchor, parameters=own)

    def _module(self, name: str, module: OutputModule, top: Level) -> Module:
        if bool(module.models) == bool(module.slices):
            raise ValueError(f"modules.{name} needs either models or slices")
        level = self._level(module.parameters, f"modules.{name}.parameters")
        if module.slices:
            return Module(
                slices=tuple(self._slice(one, at, [level, top]) for at, one in enumerate(module.slices))
            )
        experts, _, own = self._models(module.models or (), [level, top])
        return Module(experts=experts, parameters=own)

    def _spoken(
        self, sources: Sequence[Source], levels: Sequence[Level], base: str | None
    ) -> tuple[tuple[Expert, ...], Expert | None, dict[str, Setting]]:
        """Experts, base and shared parameters in our terms."""
        paths = [_path(one.model) for one in sources]
        inputs = [self._level(one.parameters, f"{path}: parameters") for one, path in zip(sources, paths)]
        taken = [at for at, path in enumerate(paths) if not (self.method.moves and path == base)]
        if self.method.base_first and base in paths:
            taken.sort(key=lambda at: paths[at] != base)
        spoken = Spoken(
            shared={name: chained(*(level.get(name) for level in levels)) for name in self.method.shared},
            own={
                name: tuple(
                    chained(inputs[at].get(name), *(level.get(name) for level in levels)) for at in taken
                )
                for name in self.method.own
            },
            names=tuple(paths[at] for at in taken),
            base=base,
        )
        self.method.check(self.document.merge_method, spoken)
        shared, own = self.method.say(spoken)
        alike = [name for name in ("density", "outliers", "epsilon") if len(set(own.get(name, (1, 2)))) == 1]
        shared, own = (
            shared | {name: own[name][0] for name in alike},
            {n: own[n] for n in own if n not in alike},
        )
        experts = tuple(
            Expert(
                model=paths[at], layers=sources[at].layer_range,
                **{name: written(values[number]) for name, values in own.items()},
            )
            for number, at in enumerate(taken)
        )  # fmt: skip
        return (
            experts,
            self._base(sources, paths, base),
            {name: written(found) for name, found in shared.items() if found},
        )

    def _base(self, sources: Sequence[Source], paths: Sequence[str], base: str | None) -> Expert | None:
        """The base in our sense, if the method has one and the models do."""
        if base is None or not (self.method.moves or self.method.keeps_base):
            return None
        layers = sources[paths.index(base)].layer_range if base in paths else None
        return Expert(model=base, layers=layers) if base in paths else None

    def _tokenizer(self) -> str | Vocabulary | None:
        found = self.document
        source: Any = found.tokenizer_source
        if found.tokenizer is None:
            return None if source is None else _path(source)
        if source is not None:
            raise ValueError("has both tokenizer_source and tokenizer; keep one")
        asked = {**found.tokenizer, "source": _path(found.tokenizer.get("source", "union"))}
        tokens = asked.get("tokens") or {}
        if isinstance(tokens, Mapping):
            asked["tokens"] = {token: _token(one) for token, one in tokens.items()}
        made, problems = validate(Vocabulary, asked)
        if made is None:
            raise ConfigError(
                [f"{self.where}: tokenizer.{problem.key}: {problem.text}" for problem in problems]
            )
        if set(made.model_fields_set) <= {"source"}:
            return made.source
        return made


def _token(asked: Any) -> Any:
    """An entry of tokenizer.tokens with models as paths."""
    source = asked.get("source") if isinstance(asked, Mapping) else None
    if isinstance(source, Mapping) and "kind" in source:
        model = {"model": _path(source["model"])} if source.get("model") is not None else {}
        return {**asked, "source": {**source, **model}}
    return {**asked, "source": _path(source)} if source is not None else asked


def _path(reference: str | Mapping[str, Any]) -> str:
    """The path of a model. Raises ValueError for what is not on this machine."""
    if not isinstance(reference, str):
        model = reference.get("model")
        path = model.get("path") if isinstance(model, Mapping) else model
        if reference.get("override_architecture") is not None:
            raise ValueError(
                f"{path}: override_architecture has no meaning here, since names of tensors decide; remove it"
            )
        lora = reference.get("lora")
        lora = lora.get("path") if isinstance(lora, Mapping) else lora
        if isinstance(model, Mapping) and model.get("revision"):
            path = f"{path}@{model['revision']}"
        reference = f"{path}+{lora}" if lora else str(path)
    if "@" in reference:
        raise ValueError(f"{reference}: a revision can only be had from a hub; download it and give its path")
    return reference
