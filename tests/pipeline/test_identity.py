"""Fingerprints: equal meaning gives an equal name; a value without a stable form has none."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.identity import canonical, fingerprint, step_fingerprint

ROOT = Path(__file__).parents[2]
SPEC = {"b": [1, 2.5, None, True], "a": {"é": "ü", "nested": {"z": 1e-5, "y": []}}, "c": "text\n"}

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def shuffled(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict):
        keys = list(value)
        rng.shuffle(keys)
        return {key: shuffled(value[key], rng) for key in keys}
    return [shuffled(item, rng) for item in value] if isinstance(value, list) else value


def test_fingerprint_is_the_same_in_other_processes_with_other_hash_seeds() -> None:
    code = f"from pipeline.identity import fingerprint; print(fingerprint({SPEC!r}))"
    for seed in ("0", "12345"):
        answer = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert answer.stdout.strip() == fingerprint(SPEC)


def test_canonical_text_is_the_one_that_artifacts_of_released_versions_carry() -> None:
    text = '{"a":{"nested":{"y":[],"z":1e-05},"é":"ü"},"b":[1,2.5,null,true],"c":"text\\n"}'
    assert canonical(SPEC) == text
    assert fingerprint({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


@settings(max_examples=100, deadline=None)
@given(json_values, st.integers(0, 1000))
def test_order_of_keys_does_not_matter_and_json_survives(value: Any, seed: int) -> None:
    assert fingerprint(shuffled(value, random.Random(seed))) == fingerprint(value)
    assert fingerprint(json.loads(json.dumps(value))) == fingerprint(value)


@settings(max_examples=100, deadline=None)
@given(json_values)
def test_canonical_text_says_the_whole_value(value: Any) -> None:
    assert json.loads(canonical(value)) == value


def test_one_number_has_one_spelling() -> None:
    assert fingerprint([1, 0, -3]) == fingerprint([1.0, -0.0, -3.0])
    assert fingerprint(0.1) != fingerprint(0.1 + 2**-56)
    assert fingerprint(2**53) != fingerprint(2**53 + 1)


def test_tuple_and_list_are_alike_but_true_and_one_are_not() -> None:
    assert fingerprint((1, (2,))) == fingerprint([1, [2]])
    assert fingerprint(True) != fingerprint(1)
    assert fingerprint("1") != fingerprint(1)


def test_kind_is_part_of_a_step() -> None:
    assert step_fingerprint("train", {"a": 1}) != step_fingerprint("merge", {"a": 1})


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (float("nan"), "$"),
        ({"recipe": {"lr": float("inf")}}, "$.recipe.lr"),
        ({"a": [0, {1, 2}]}, "$.a[1]"),
        ({"a": object()}, "$.a"),
        ({"a": b"x"}, "$.a"),
        ({"a": Path("x")}, "$.a"),
        ({"a": np.float64(1.0)}, "$.a"),
        ({"a": np.int64(1)}, "$.a"),
        ({1: 2}, "$"),
        ({"a": {None: 1}}, "$.a"),
        ("\ud800", "$"),
        (json_values, "$"),
    ],
)
def test_value_without_a_stable_form_is_refused_with_its_place(value: Any, place: str) -> None:
    with pytest.raises(TypeError, match="no fingerprint") as caught:
        fingerprint(value)
    assert str(caught.value).startswith(f"{place}:")


def test_endless_value_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(TypeError, match="deeper"):
        fingerprint(endless)
