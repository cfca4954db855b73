"""The merging techniques as plain values, for `temporal-merge techniques --json` and for Python."""

from collections.abc import Mapping
from typing import Any

from merge_service.techniques import Evidence, Technique, get, names


def techniques_as_json(name: str | None) -> Any:
    """One technique, or all, as plain values."""
    if name is not None:
        return _technique(name)
    return [_technique(one) for one in names()]


def _technique(name: str) -> dict[str, Any]:
    one = get(name)
    defaults = {param.name: param.default for param in one.params}
    asked = one.asked(defaults)
    return {
        "name": one.name,
        "formula": one.formula,
        "paper": one.paper,
        "needs": sorted(one.needs),
        "data": None if asked is None else _data(asked),
        "statistics": [] if asked is None else [asked.kind],
        "state": _state(one, defaults),
        "arrival": "flat"
        if "stream" in one.forms
        else "grows with the experts"
        if one.arity is None
        else "flat",
        "forms": sorted(one.forms),
        "params": {
            param.name: {"default": param.default, "doc": param.doc, "choices": list(param.choices or ())}
            for param in one.params
        },
    }


def _data(asked: Evidence) -> str:
    """What data of every expert's task is needed, with default parameters."""
    if asked.of == "experts":
        return "unlabelled images of every expert's task, at every merge"
    return f"{'labelled' if asked.labels else 'unlabelled'} images of every expert's task, once"


def _state(one: Technique, defaults: Mapping[str, Any]) -> str:
    """What must be kept to add another expert."""
    if one.keeps:
        return one.keeps
    if "stream" in one.forms:
        rule = one.rule(defaults)
        return f"{4 * (len(rule.floats) + len(rule.words))} B per weight"
    return "all experts" if one.arity is None else "the running model"
