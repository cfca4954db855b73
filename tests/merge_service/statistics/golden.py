"""The golden vectors of techniques that use data: cases by kind, their files, and how a result is compared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

FOLDER = Path(__file__).parents[2] / "golden" / "data_driven"
CASES: list[dict[str, Any]] = json.loads((FOLDER / "cases.json").read_text())["cases"]


def cases(kind: str, *techniques: str) -> list[dict[str, Any]]:
    return [one for one in CASES if one["kind"] == kind and one["technique"] in techniques]


def case(name: str) -> dict[str, Any]:
    return next(one for one in CASES if one["name"] == name)


def files(one: dict[str, Any], key: str) -> list[Path]:
    return [FOLDER / name for name in one.get(key, [])]


def check(one: dict[str, Any], out: Path) -> None:
    """Elementwise |got - expected| <= atol + rtol |expected|, and the same tensors."""
    check_tensors(one, load_file(out))


def check_tensors(one: dict[str, Any], got: Any) -> None:
    expected = load_file(FOLDER / one["expected"])
    assert set(got) == set(expected)
    for name, right in expected.items():
        assert got[name].shape == right.shape, name
        apart = np.abs(np.asarray(got[name], np.float64) - right)
        limit = one["atol"] + one["rtol"] * np.abs(right)
        assert (apart <= limit).all(), f"{name}: {(apart / limit).max():.3g} times the tolerance"
