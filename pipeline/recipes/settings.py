"""Values of a recipe that may differ between tensors: a number, a gradient over depth, or conditions on tensor names.

A setting is a scalar; a list of scalars, which is a gradient; a mapping {filter, value}; or a list of such mappings, of which the
first whose `filter` is part of the tensor's name counts. The conventions are those of mergekit, arXiv 2403.13257: layer i of L lies
at t = i / (L - 1), and tensors outside layers at t = 0, so that a gradient gives them its first entry.

Invariant: a setting is a plain JSON value; two settings with equal rules give equal values.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Scalar = bool | int | float | str
Setting = Any
"""A JSON value that `rules` accepts."""
TABLES = ("coefficients",)
"""Parameters that say for themselves which tensors they are for, and so are no settings."""


@dataclass(frozen=True)
class When:
    """A value or gradient, for tensors whose name has `part` in it (None: all)."""

    part: str | None
    value: Scalar | tuple[Scalar, ...]


def rules(setting: Setting) -> tuple[When, ...]:
    """The rules of a setting, first match first; none for None. Raises ValueError for anything that is no setting."""
    if setting is None or setting == []:
        return ()
    if _is_scalar(setting):
        return (When(None, setting),)
    if isinstance(setting, Mapping):
        return (_when(setting),)
    if isinstance(setting, list | tuple):
        if all(_is_scalar(one) for one in setting):
            return (When(None, _gradient(setting)),)
        if all(isinstance(one, Mapping) for one in setting):
            return tuple(_when(one) for one in setting)
    raise ValueError(
        "is neither a number, nor a list of numbers (a gradient over depth), nor {filter, value}, nor a list of these"
    )


def chained(*settings: Setting) -> tuple[When, ...]:
    """The rules of several settings; an earlier one takes precedence where it has a value."""
    return tuple(rule for setting in settings for rule in rules(setting))


def value_at(found: Iterable[When], name: str, t: float) -> Scalar | None:
    """The value for a tensor at depth t of 0..1; None if no rule applies."""
    for rule in found:
        if rule.part is None or rule.part in name:
            return _at(rule.value, t)
    return None


def is_uniform(setting: Setting) -> bool:
    """Whether every tensor has the same value."""
    found = rules(setting)
    return not found or (found[0].part is None and not isinstance(found[0].value, tuple))


def written(found: Sequence[When]) -> Setting:
    """The shortest setting with these rules."""
    kept = []
    for rule in found:
        kept.append(rule)
        if rule.part is None:
            break
    if not kept:
        return None
    if kept[0].part is None:
        return _plain(kept[0].value)
    return [
        {**({} if rule.part is None else {"filter": rule.part}), "value": _plain(rule.value)} for rule in kept
    ]


def _plain(value: Scalar | tuple[Scalar, ...]) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _when(setting: Mapping[str, Any]) -> When:
    unknown = setting.keys() - {"filter", "value"}
    if unknown or "value" not in setting:
        raise ValueError(
            f"{'has the key ' + repr(min(unknown)) if unknown else 'has no value'}; write {{filter: mlp, value: 0.5}}"
        )
    part, value = setting.get("filter"), setting["value"]
    if part is not None and not isinstance(part, str):
        raise ValueError(f"has the filter {part!r}, which is no part of a tensor's name")
    if isinstance(value, list):
        value = _gradient(value)
    elif not _is_scalar(value):
        raise ValueError(f"has the value {value!r}, which is neither a number nor a list of numbers")
    return When(None if part == "*" else part, value)


def _gradient(values: Sequence[Any]) -> tuple[Scalar, ...]:
    if not values or not all(_is_scalar(one) for one in values):
        raise ValueError(f"has the gradient {list(values)!r}; give at least one number")
    return tuple(values)


def _at(value: Scalar | tuple[Scalar, ...], t: float) -> Scalar:
    if not isinstance(value, tuple):
        return value
    scaled = t * (len(value) - 1)
    low = int(scaled)
    first, second = value[low], value[min(low + 1, len(value) - 1)]
    if any(isinstance(one, bool | str) for one in value):
        return first
    return (1 - (scaled - low)) * float(first) + (scaled - low) * float(second)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)
