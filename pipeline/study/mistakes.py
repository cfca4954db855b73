"""Messages for mistakes in a study: which key, what is wrong with it, what to write instead.

Invariant: values are validated as strictly as JSON (true and text are not numbers), and every message names the full
key path. The message for an unknown key names the nearest valid one.
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from pipeline.study.addresses import redact

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Problem:
    """One mistake: the full key path, and the text of what is wrong and what to do."""

    key: str
    text: str


def validate(model: type[Model], raw: Any, prefix: str = "") -> tuple[Model | None, list[Problem]]:
    """`raw` as a `model`, or None and its problems; `prefix` is the key path of `raw` itself."""
    try:
        return model.model_validate_json(json.dumps(raw), strict=True), []
    except ValidationError as error:
        return None, [_problem(model, entry, prefix) for entry in error.errors(include_url=False)]


def nearest(word: str, among: Iterable[str]) -> str:
    """'; did you mean X?' or an empty string."""
    found = difflib.get_close_matches(str(word).lower().replace("-", "_"), list(among), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def key_path(prefix: str, loc: Iterable[str | int]) -> str:
    """The key path of a location within `prefix`: `a.b[2].c`."""
    path = prefix
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def short(value: Any) -> str:
    """A value as written in the file, cut to a readable length and without possible secrets in addresses."""
    text = redact(json.dumps(value, ensure_ascii=False, default=repr))
    return text if len(text) <= 60 else f"{text[:57]}..."


def leaf_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Key paths of all values of a model, sections first."""
    for name, field in model.model_fields.items():
        inner = _section(field.annotation)
        yield prefix + name
        if inner is not None:
            yield from leaf_keys(inner, f"{prefix}{name}.")


def _problem(model: type[BaseModel], entry: Mapping[str, Any], prefix: str) -> Problem:
    loc, kind, value = entry["loc"], entry["type"], entry["input"]
    key = key_path(prefix, loc)
    if kind == "extra_forbidden":
        return Problem(key, _unknown(model, loc, prefix))
    if kind == "missing" and isinstance(loc[-1], int):
        return Problem(key_path(prefix, loc[:-1]), f"{short(value)} has too few values")
    if kind == "missing":
        return Problem(key, "is missing; it has no default")
    if kind == "value_error":
        text = str(entry["ctx"]["error"])
        return Problem(key, text)
    if kind == "literal_error":
        if loc[-1] == "[key]":  # a key of a mapping is wrong; pydantic reports it one level below
            key, loc = key_path(prefix, loc[:-1]), loc[:-2]
        options = [str(option) for option in _options(model, loc)]
        return Problem(
            key, f"{short(value)} is not one of {', '.join(options)}{nearest(str(value), options)}"
        )
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return Problem(key or "study", f"{short(value)} must be a mapping of keys to values")
    text = entry["msg"].replace("Input should be a valid string", "must be text")
    text = text.replace("Input should be a valid tuple", "must be a list").replace(
        "Input should be", "must be"
    )
    return Problem(key, f"{short(value)} {text[0].lower()}{text[1:]}")


def _unknown(model: type[BaseModel], loc: tuple[str | int, ...], prefix: str) -> str:
    wrong = str(loc[-1])
    parent = _model_at(model, loc[:-1])
    here = list(parent.model_fields)
    elsewhere = [path for path in leaf_keys(model) if path.rpartition(".")[2] == wrong]
    sibling = difflib.get_close_matches(wrong.lower().replace("-", "_"), here, n=1)
    if sibling:
        hint = f"did you mean {key_path(prefix, [*loc[:-1], sibling[0]])}?"
    elif elsewhere:
        hint = f"did you mean {key_path(prefix, [elsewhere[0]])}?"
    else:
        hint = "did you mean one of its neighbours?" if not here else f"valid keys here: {', '.join(here)}"
        close = difflib.get_close_matches(wrong, here, n=1, cutoff=0.0)
        hint = (
            f"the nearest valid key is {key_path(prefix, [*loc[:-1], close[0]])}; {hint}" if close else hint
        )
    return f"unknown key; {hint}"


def _model_at(model: type[BaseModel], loc: Iterable[str | int]) -> type[BaseModel]:
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            model = _section(model.model_fields[part].annotation) or model
    return model


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section type of a field, inside Optional and tuples."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section(inner)) is not None), None)


def _options(model: type[BaseModel], loc: tuple[str | int, ...]) -> list[Any]:
    names = [part for part in loc if isinstance(part, str)]
    field = _model_at(model, loc[:-1]).model_fields[names[-1]]
    return [option for option in _literals(field.annotation) if option is not None]


def _literals(annotation: Any) -> Iterator[Any]:
    for inner in get_args(annotation):
        if get_args(inner):
            yield from _literals(inner)
        elif not isinstance(inner, type):
            yield inner
