"""Merging on a torch device: the same code as on a GPU, on the device that every machine has."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from merge_service import techniques
from merge_service.blocks.device import Device, _Stage
from merge_service.blocks.spans import GRAIN, Span
from merge_service.checkpoints.weights import Weights
from merge_service.engine import compute
from merge_service.errors import NonFiniteCheckpoint, TechniqueError
from merge_service.merge import advance, merge
from merge_service.merging.derivation import Rules
from tests.merge_service import measured, toys
from tests.merge_service.rounding import BY_LIBRARY

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


@pytest.mark.parametrize("name", measured.GIVEN)
def test_merge_on_a_device_has_the_bytes_of_the_compiled_loops(tmp_path: Path, name: str) -> None:
    base, experts = room(tmp_path, techniques.get(name).arity or 3)
    for path in experts:
        measured.of_technique(name, path)
    reports = [
        merge(name, {}, base, experts, tmp_path / f"{device}.safetensors", threads=2, device=device)
        for device in (None, "cpu")
    ]
    here, there = (tmp_path / f"{device}.safetensors" for device in (None, "cpu"))
    if name not in BY_LIBRARY:
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


class Small(Device):
    """A device on which no block of more than `room` elements fits."""

    room = GRAIN

    def read(self, weights: Weights, span: Span, compute: np.dtype) -> Any:
        block = super().read(weights, span, compute)
        if span.size > self.room:
            raise torch.OutOfMemoryError("no room")
        return block


@pytest.mark.parametrize("name", ["ties", "dare_ties", "average", "dare"])
def test_block_that_does_not_fit_is_halved_to_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    shapes = {"visual.proj": (5 * GRAIN + 7,), "text_projection": (300, 300)}
    models = [{n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()} for _ in range(4)]
    base, *experts = [toys.save(tmp_path / f"{i}.safetensors", model) for i, model in enumerate(models)]
    rules = Rules(any_base=True)
    merge(name, {}, base, experts, tmp_path / "loops.safetensors", rules=rules)
    monkeypatch.setattr(compute, "Device", Small)
    merge(name, {}, base, experts, tmp_path / "device.safetensors", device="cpu", rules=rules)
    assert (tmp_path / "loops.safetensors").read_bytes() == (tmp_path / "device.safetensors").read_bytes()
    state = None
    for number, expert in enumerate(experts):
        after = tmp_path / f"state-{number}.safetensors"
        advance(
            "average", {}, base, expert, tmp_path / "stream.safetensors", expert_id=f"t{number}", state_in=state,
            state_out=after, device="cpu", rules=rules,
        )  # fmt: skip
        state = after
    merge("average", {}, base, experts, tmp_path / "batch.safetensors", ids=["t0", "t1", "t2"], rules=rules)
    assert (tmp_path / "stream.safetensors").read_bytes() == (tmp_path / "batch.safetensors").read_bytes()


def test_device_without_room_for_a_grain_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = room(tmp_path, 2)
    monkeypatch.setattr(Small, "room", 1)
    monkeypatch.setattr(compute, "Device", Small)
    with pytest.raises(TechniqueError, match=r"no room for \d+ elements of .* of 2 experts"):
        merge("average", {}, base, experts, tmp_path / "out.safetensors", device="cpu")
    assert not (tmp_path / "out.safetensors").exists()


class Card:
    """torch as far as a pinned buffer uses it; `log` holds what was asked of the device, in order."""

    uint8 = torch.uint8

    def __init__(self) -> None:
        self.log: list[str] = []
        self.cuda = SimpleNamespace(Event=self._event)

    def _event(self) -> Any:
        return SimpleNamespace(
            synchronize=lambda: self.log.append("wait"), record=lambda: self.log.append("record")
        )

    def empty(self, size: int, dtype: torch.dtype, pin_memory: bool = False) -> torch.Tensor:
        self.log += ["pin"] if pin_memory else []
        return torch.empty(size, dtype=dtype)

    def from_numpy(self, array: np.ndarray) -> Any:
        def to(device: str, non_blocking: bool) -> np.ndarray:
            self.log.append(f"copy to {device}" if non_blocking else "blocking copy")
            return array.copy()

        return SimpleNamespace(to=to)


def test_pinned_buffer_is_filled_again_only_after_its_copy() -> None:
    card = Card()
    stage = _Stage(card)
    for values in (np.arange(5, dtype=np.float32), np.arange(4, dtype=np.int16), np.arange(9.0)):
        np.testing.assert_array_equal(stage.upload(values, "card"), values)
    step = ["copy to card", "record"]
    assert card.log == ["wait", "pin", *step, "wait", *step, "wait", "pin", *step]
