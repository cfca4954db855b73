"""The merging techniques as plain values, for `temporal-merge techniques --json` and from Python."""

from typing import Any

from merge_service.techniques import get, names


def techniques_as_json(name: str | None) -> Any:
    """One technique, or all, as plain values."""
    if name is not None:
        return _technique(name)
    return [_technique(one) for one in names()]


def _technique(name: str) -> dict[str, Any]:
    one = get(name)
    return {
        "name": one.name,
        "formula": one.formula,
        "paper": one.paper,
        "needs": sorted(one.needs),
        "forms": sorted(one.forms),
        "params": {
            param.name: {"default": param.default, "doc": param.doc, "choices": list(param.choices or ())}
            for param in one.params
        },
    }
