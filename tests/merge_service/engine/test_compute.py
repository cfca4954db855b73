"""Spans by the compiled loops and by the definitions of the rules: the same bits, in a wide enough type."""

from pathlib import Path

import numpy as np
import pytest

from merge_service import techniques
from merge_service.engine import fused as loops
from merge_service.engine.compute import Compute
from merge_service.merge import merge
from tests.merge_service import measured, plain_extra, toys
from tests.merge_service.toys import Files

FURTHER = [n for n in plain_extra.TECHNIQUES if n != "dare_ties"]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.mark.parametrize("name", [n for n in measured.GIVEN if n != "slerp"])
def test_fused_loops_give_the_bits_of_the_definitions(
    files: Files, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = files.merge(name)
    monkeypatch.setattr(loops, "fits", lambda weights, tensor: False)
    for tensor, value in files.merge(name).items():
        assert value.tobytes() == fused[tensor].tobytes(), tensor


@pytest.mark.parametrize("name", ["dare", "wise_ft", "breadcrumbs"])
def test_what_can_be_fused_is(files: Files, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compute, "_by_definition", None)
    files.merge(name, {"granularity": "tensor"} if name == "breadcrumbs" else {})


@pytest.mark.parametrize("name", FURTHER)
def test_half_precision_and_double_inputs_are_merged_in_a_wide_enough_type(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(2)
    count = techniques.get(name).arity or 3
    base = {"w": toys.dyadic(rng, (6, 7), 8)}
    experts = [{"w": base["w"] + toys.dyadic(rng, (6, 7), 8)} for _ in range(count)]
    ids = [f"t{i}" for i in range(count)]
    for kind in ("F16", "BF16", "F64"):
        arrays = [{"w": m["w"].astype(toys.NUMPY.get(kind, np.float32))} for m in (base, *experts)]
        paths = [
            toys.save(tmp_path / f"{i}.safetensors", model, dtypes={"w": kind})
            for i, model in enumerate(arrays)
        ]
        report = merge(name, {}, paths[0], paths[1:], tmp_path / "o.safetensors", ids=ids)
        expected = plain_extra.merge(name, report.params, base, experts, ids)["w"]
        tolerance = {"F16": 2e-3, "BF16": 2e-2, "F64": 1e-12}[kind]
        np.testing.assert_allclose(
            toys.load(tmp_path / "o.safetensors")["w"], expected, rtol=tolerance, atol=tolerance
        )
