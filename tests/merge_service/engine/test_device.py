"""Merging on a torch device: the same code as on a GPU, on the device that every machine has."""

from pathlib import Path

import numpy as np
import pytest

from merge_service import techniques
from merge_service.errors import NonFiniteCheckpoint, TechniqueError
from merge_service.merge import advance, merge
from tests.merge_service import toys

ROUNDED = {"pcb", "iso_c", "iso_cts", "opcm", "rapf"}
"""Techniques whose functions (exp, tanh, eigenvectors) numpy and torch round differently."""
HALVES = {"visual.transformer.resblocks.0.mlp.weight": "F16", "transformer.resblocks.1.mlp.weight": "BF16"}


def room(where: Path, count: int) -> tuple[Path, list[Path]]:
    rng = np.random.default_rng(8)
    base = toys.towers(rng)
    models = [base, *(toys.moved(rng, base, frozen=("visual.ln_pre.bias",)) for _ in range(count))]
    paths = [
        toys.save(where / f"{i}.safetensors", model, dtypes=HALVES if i == 1 else None)
        for i, model in enumerate(models)
    ]
    return paths[0], paths[1:]


@pytest.mark.parametrize("name", techniques.names())
def test_merge_on_a_device_has_the_bytes_of_the_compiled_loops(tmp_path: Path, name: str) -> None:
    base, experts = room(tmp_path, techniques.get(name).arity or 3)
    reports = [
        merge(name, {}, base, experts, tmp_path / f"{device}.safetensors", threads=2, device=device)
        for device in (None, "cpu")
    ]
    here, there = (tmp_path / f"{device}.safetensors" for device in (None, "cpu"))
    if name not in ROUNDED:
        assert here.read_bytes() == there.read_bytes()
    for tensor, value in toys.load(here).items():
        np.testing.assert_allclose(toys.load(there)[tensor], value, rtol=0, atol=1e-5, err_msg=tensor)
    assert reports[0].merged_norm == pytest.approx(reports[1].merged_norm, rel=1e-6)


@pytest.mark.parametrize("name", ["ties", "magmax", "random_mix", "average"])
def test_stream_on_a_device_continues_a_state_from_the_loops(tmp_path: Path, name: str) -> None:
    base, experts = room(tmp_path, 3)
    state = None
    for number, (expert, device) in enumerate(zip(experts, (None, "cpu", "cpu"))):
        after = tmp_path / f"state-{number}.safetensors"
        advance(
            name, {}, base, expert, tmp_path / "stream.safetensors", expert_id=f"t{number}", state_in=state,
            state_out=after, device=device,
        )  # fmt: skip
        state = after
    merge(name, {}, base, experts, tmp_path / "batch.safetensors", ids=["t0", "t1", "t2"])
    assert (tmp_path / "stream.safetensors").read_bytes() == (tmp_path / "batch.safetensors").read_bytes()


def test_expert_with_nan_is_named_on_a_device_too(tmp_path: Path) -> None:
    base, experts = room(tmp_path, 2)
    broken = toys.load(experts[1])
    broken["text_projection"][1, 1] = np.nan
    toys.save(experts[1], broken)
    with pytest.raises(NonFiniteCheckpoint, match=r"2\.safetensors.*text_projection has 1 of 12"):
        merge("ties", {}, base, experts, tmp_path / "out.safetensors", device="cpu")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("device", ["cuda:63", "gpu", "abacus"])
def test_device_that_is_not_there_is_refused_by_name(tmp_path: Path, device: str) -> None:
    base, experts = room(tmp_path, 2)
    with pytest.raises(TechniqueError, match=f"the device {device} cannot be used"):
        merge("average", {}, base, experts, tmp_path / "out.safetensors", device=device)
