"""A recipe as checked values: the merges of a chain, each with its technique, models, layers and parameters.

Invariant: a `Merge` says everything that bears on the merged tensors. Models are paths, or names of earlier merges of the chain.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from merge_service.techniques import get
from pipeline.recipes.settings import TABLES, Setting, rules

PER_EXPERT = ("weight", "density", "outliers", "epsilon")
"""Parameters that an expert may have for itself."""


def _setting(value: Setting) -> Setting:
    rules(value)
    return value


Settable = Annotated[Any, AfterValidator(_setting)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Expert(_Part):
    """A model: its path or the name of an earlier merge. `layers` (from, to) is a half-open range of its blocks, in slices only.
    `factor` multiplies its tensors, `statistics` is the file of what was measured of it. The others are as of `PER_EXPERT`.
    """

    model: str = Field(min_length=1)
    id: str | None = None
    layers: tuple[int, int] | None = None
    weight: Settable = None
    density: Settable = None
    outliers: Settable = None
    epsilon: Settable = None
    statistics: str | None = None
    factor: Settable = None


def _named(value: Any) -> Any:
    """A path alone is a model; a range becomes what strict validation takes for one."""
    if isinstance(value, str):
        return {"model": value}
    if isinstance(value, dict) and isinstance(value.get("layers"), list):
        return {**value, "layers": tuple(value["layers"])}
    return value


def _parameters(values: Mapping[str, Any]) -> Mapping[str, Any]:
    for name, value in values.items():
        if name not in TABLES:
            try:
                rules(value)
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None
    return values


Model = Annotated[Expert, BeforeValidator(_named)]
Parameters = Annotated[Mapping[str, Any], AfterValidator(_parameters)]


class Slice(_Part):
    """Blocks of the output, made of equally many blocks of each model."""

    experts: tuple[Model, ...]
    base: Model | None = None
    parameters: Parameters = {}

    @model_validator(mode="after")
    def _some(self) -> "Slice":
        if not self.experts:
            raise ValueError("needs experts, at least one")
        return self


class Module(_Part):
    """A part of the model with experts or slices of its own: an encoder, a decoder, a vision tower."""

    experts: tuple[Model, ...] = ()
    slices: tuple[Slice, ...] = ()
    parameters: Parameters = {}

    @model_validator(mode="after")
    def _one(self) -> "Module":
        if bool(self.experts) == bool(self.slices):
            raise ValueError("needs experts or slices, one of the two")
        return self


class TokenOf(_Part):
    """A row of embeddings: zeros, or that of a token of a model, by text or id."""

    kind: Literal["zero", "model_token"]
    model: str | None = None
    token: str | None = None
    token_id: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _whole(self) -> "TokenOf":
        if self.kind == "model_token" and (
            self.model is None or (self.token is None) == (self.token_id is None)
        ):
            raise ValueError("of the kind model_token needs a model, and either token or token_id")
        if self.kind == "zero" and (self.model, self.token, self.token_id) != (None, None, None):
            raise ValueError("of the kind zero has no model and no token")
        return self


class TokenSource(_Part):
    """Where a token's row comes from in models that lack it, or with `force` in all; a model's path, or a `TokenOf`."""

    source: str | TokenOf | None = None
    force: bool = False


class Vocabulary(_Part):
    """The tokenizer of the output: base, union, or the path of a model; rows of single tokens, and padding of the embeddings."""

    source: str = Field(default="base", min_length=1)
    tokens: Mapping[str, TokenSource] = {}
    pad_to_multiple_of: int | None = Field(default=None, ge=1)


class Merge(_Part):
    """One merge. `name` lets later merges of the chain use it as a model. `any_base` and `strip_prefix` are the options of `merge`."""

    name: str | None = None
    technique: str
    base: str | None = None
    experts: tuple[Model, ...] = ()
    slices: tuple[Slice, ...] = ()
    modules: Mapping[str, Module] = {}
    parameters: Parameters = {}
    dtype: str | None = None
    tokenizer: str | Vocabulary | None = None
    chat_template: str | None = None
    any_base: bool = False
    strip_prefix: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> "Merge":
        get(self.technique)
        if "weights" in self.parameters:
            raise ValueError("has parameters.weights; give each expert its own: {model: PATH, weight: 0.3}")
        if sum(map(bool, (self.experts, self.slices, self.modules))) != 1:
            raise ValueError("needs experts, slices or modules, one of the three")
        if self.chat_template not in (None, "auto") and "{" not in str(self.chat_template):
            raise ValueError(
                f"has chat_template: {self.chat_template}; give auto (the most common of the models) or the text of a Jinja template"
            )
        return self

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer as it was asked for, in its long form."""
        return (
            self.tokenizer
            if isinstance(self.tokenizer, Vocabulary)
            else Vocabulary(source=self.tokenizer or "base")
        )

    @property
    def models(self) -> tuple[str, ...]:
        """Every model, the base first, each once."""
        held = [self.base] if self.base else []
        parts: list[Merge | Module] = [self, *self.modules.values()]
        for part in parts:
            held += [one.model for one in part.experts]
            for piece in part.slices:
                held += [one.model for one in (*([piece.base] if piece.base else []), *piece.experts)]
        return tuple(dict.fromkeys(held))

    def with_models(self, places: Mapping[str, str]) -> "Merge":
        """The merge with other paths of models."""

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                known = {
                    key: places.get(one, one)
                    if isinstance(one, str)
                    and key in _PATHS
                    and not (key in _WORDS and one in ("base", "union"))
                    else moved(one)
                    for key, one in value.items()
                }
                return known
            return [moved(one) for one in value] if isinstance(value, list | tuple) else value

        return Merge.model_validate(moved(self.model_dump()))


class Recipe(_Part):
    """A chain of merges, in order; the last one is the result."""

    merges: tuple[Merge, ...]

    @model_validator(mode="after")
    def _ordered(self) -> "Recipe":
        if not self.merges:
            raise ValueError("has no merge; write at least one")
        names = [one.name for one in self.merges if one.name]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"has two merges called {twice}")
        for at, one in enumerate(self.merges[:-1]):
            if not one.name:
                raise ValueError(f"merges[{at}] has no name, so that no later merge can use it")
        return self

    def to_yaml(self) -> str:
        """The recipe as `read_recipe` reads it."""
        found = [_plain(one.model_dump(exclude_defaults=True)) for one in self.merges]
        tree: Any = found[0] if len(found) == 1 else {"merges": found}
        return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


_PATHS = ("model", "base", "tokenizer", "source")
_WORDS = ("tokenizer", "source")


class _Dumper(yaml.SafeDumper):
    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        flat = all(isinstance(one, int | float) for one in sequence)
        return super().represent_sequence(tag, sequence, flow_style=flat)


def _plain(value: Any) -> Any:
    """As YAML has it; an expert that is only a path is written as one."""
    if isinstance(value, Mapping):
        return (
            value["model"] if value.keys() == {"model"} else {key: _plain(one) for key, one in value.items()}
        )
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return value
