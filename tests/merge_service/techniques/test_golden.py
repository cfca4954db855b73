"""Every technique compared with the numbers of its reference implementation."""

import json
from pathlib import Path

import numpy as np
import pytest

from merge_service.merge import fold, merge
from tests.merge_service import toys

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "techniques.json").read_text())


def write(path: Path, values: np.ndarray, tensors: list) -> Path:
    return toys.save(path, {name: values[start:stop] for name, start, stop in tensors})


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_technique_gives_the_golden_vector(case: dict, tmp_path: Path) -> None:
    start = toys.vector(case.get("base", GOLDEN["base"]))
    taus = [toys.vector(tau) for tau in case.get("tau", GOLDEN["tau"])]
    tensors = case.get("tensors", [["weight", 0, start.size]])
    base = write(tmp_path / "base.safetensors", start, tensors)
    experts = [
        write(tmp_path / f"{number}.safetensors", start + taus[number - 1], tensors)
        for number in case.get("experts", range(1, len(taus) + 1))
    ]
    out = tmp_path / "out.safetensors"
    if case.get("form") == "fold":
        running = base
        for number, expert in enumerate(experts):
            out = tmp_path / f"running-{number}.safetensors"
            fold(case["technique"], case["params"], base, running, expert, out)
            running = out
    else:
        merge(case["technique"], case["params"], base, experts, out)
    result = np.concatenate([toys.load(out)[name] for name, _, _ in tensors])
    expected = toys.vector(case["theta"]) if "theta" in case else start + toys.vector(case["delta"])
    np.testing.assert_allclose(result, expected, rtol=0, atol=case.get("tolerance", 0))
