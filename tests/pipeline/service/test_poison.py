"""Poisoned experts against the door and the gates, each stopped by the gate that is for it; toy models."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from merge_service.errors import ForeignCheckpoint
from merge_service.live import Refused
from pipeline.service.operations import Operations
from tests.merge_service import toys as files
from tests.pipeline.service import toys

Tensors = dict[str, np.ndarray]
FIVE = toys.TASKS[:5]


def poisoned(change: Callable[[Tensors, np.random.Generator], None]) -> Callable[[Path], Path]:
    def write(room: Path) -> Path:
        tensors = toys.moved(toys.direction("task5"))
        change(tensors, np.random.default_rng(1))
        return files.save(room / "poisoned.safetensors", tensors)

    return write


def scaled(factor: float) -> Callable[[Path], Path]:
    return lambda room: toys.expert(room, "task5", size=factor * toys.SIZE)


def noise(tensors: Tensors, rng: np.random.Generator) -> None:
    by = {name: rng.standard_normal(value.shape) for name, value in tensors.items() if value.shape}
    norm = np.sqrt(sum(float((value**2).sum()) for value in by.values()))
    tensors.update(toys.moved({name: value / norm for name, value in by.items()}))


def shuffled(tensors: Tensors, rng: np.random.Generator) -> None:
    start = toys.base()
    for name, value in tensors.items():
        moved = (value - start[name]).reshape(-1)
        tensors[name] = start[name] + rng.permutation(moved).reshape(value.shape)


def put(name: str, value: float) -> Callable[[Tensors, np.random.Generator], None]:
    def change(tensors: Tensors, rng: np.random.Generator) -> None:
        tensors[name].reshape(-1)[0] = value

    return change


MATRIX = "visual.transformer.resblocks.0.mlp.weight"
POISONS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "flipped": (scaled(-1.0), "solo.no_gain"),
    "ten times": (scaled(10.0), "geometry.norm"),
    "a tenth": (scaled(0.1), "geometry.norm"),
    "noise": (poisoned(noise), "solo.no_gain"),
    "shuffled": (poisoned(shuffled), "solo.no_gain"),
    "the base": (scaled(0.0), "geometry.unmoved"),
    "copy of another's": (lambda room: toys.expert(room, "task1"), "geometry.copy"),
    "scaled copy of another's": (lambda room: toys.expert(room, "task1", size=3.0), "geometry.copy"),
    "nan": (poisoned(put(MATRIX, np.nan)), "format.non_finite"),
    "infinite": (poisoned(put("logit_scale", np.inf)), "format.non_finite"),
    "one huge value": (poisoned(put(MATRIX, 1e30)), "geometry.norm"),
    "missing tensor": (poisoned(lambda tensors, _: tensors.__delitem__(MATRIX)), "format.tensors"),
    "extra tensor": (poisoned(lambda tensors, _: tensors.update(more=np.zeros(3, np.float32))), "format.tensors"),
    "other shape": (
        poisoned(lambda tensors, _: tensors.update({MATRIX: np.zeros((16, 24), np.float32)})),
        "format.tensors",
    ),
    "other dtype": (
        poisoned(lambda tensors, _: tensors.update({MATRIX: tensors[MATRIX].astype(np.float16)})),
        "format.tensors",
    ),
    "expert of another task": (lambda room: toys.expert(room, "task9"), "solo.no_gain"),
}  # fmt: skip


@pytest.fixture(scope="module")
def accepted(tmp_path_factory: pytest.TempPathFactory) -> toys.Home:
    """A service with five accepted experts."""
    room = tmp_path_factory.mktemp("accepted")
    service = toys.home(room / "out")
    for task in FIVE:
        toys.arrive(service, toys.expert(room, task), task)
    assert service.log.state.t == 5
    return service


@pytest.mark.parametrize("what", POISONS)
def test_poisoned_expert_is_stopped_by_its_gate_and_leaves_no_trace(
    what: str, accepted: toys.Home, tmp_path: Path
) -> None:
    write, reason = POISONS[what]
    before = accepted.log.state
    name = toys.arrive(accepted, write(tmp_path), "task5")
    state = accepted.log.state
    arrival = state.arrivals[name]
    assert arrival.status == "quarantined" and reason in arrival.reasons, arrival.detail
    assert arrival.detail and str(accepted.out) not in arrival.detail
    assert (state.sequence, state.served) == (before.sequence, before.served)
    if reason.startswith("format"):
        assert accepted.experts.record(arrival.sha256) is None
        with pytest.raises(Refused, match="cannot be merged"):
            Operations(accepted).release(name, "I am sure")


def test_honest_expert_is_promoted_after_all_that(accepted: toys.Home, tmp_path: Path) -> None:
    name = toys.arrive(accepted, toys.expert(tmp_path, "task6"), "task6")
    assert accepted.log.state.shown(name) == "promoted"


def test_released_arrival_passes_the_gate_that_was_waived_and_no_other(
    accepted: toys.Home, tmp_path: Path
) -> None:
    name = toys.arrive(accepted, toys.expert(tmp_path, "task7", size=-40.0), "task7")
    assert accepted.log.state.arrivals[name].reasons[0] == "geometry.norm"
    Operations(accepted).release(name, "known to be large")
    arrival = toys.work(accepted).arrivals[name]
    assert arrival.status == "quarantined" and arrival.reasons == ("solo.no_gain",)


def test_without_enough_experts_and_without_a_reference_an_arrival_is_held_for_a_person(
    tmp_path: Path,
) -> None:
    gates = {**toys.config().gates.model_dump(mode="json"), "geometry": {}}
    service = toys.home(tmp_path / "out", gates=gates)
    name = toys.arrive(service, toys.expert(tmp_path, "task0"), "task0")
    assert service.log.state.arrivals[name].reasons == ("geometry.no_reference",)
    Operations(service).release(name, "the first one")
    assert toys.work(service).shown(name) == "promoted"


def test_licence_and_foreign_start_are_asked_for_before_anything_is_scored(tmp_path: Path) -> None:
    service = toys.home(tmp_path / "out", admission={"licenses": ["MIT"], "foreign_init": "quarantine"})
    name = toys.arrive(service, toys.expert(tmp_path, "task0"), "task0", init="f" * 64)
    assert service.log.state.arrivals[name].reasons == ("provenance.license", "provenance.foreign_init")
    good = toys.arrive(service, toys.expert(tmp_path, "task0"), "task0", license="MIT")
    assert service.log.state.shown(good) == "promoted"


@pytest.mark.parametrize("content", [b"\x80\x04pickle", b"", b"\xff" * 4096])
def test_what_is_no_safetensors_is_refused_or_quarantined_and_never_stored(
    content: bytes, tmp_path: Path
) -> None:
    service = toys.home(tmp_path / "out")
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    if content.startswith(b"\x80"):
        with pytest.raises(ForeignCheckpoint, match="never loaded"):
            toys.arrive(service, path, "task0")
    else:
        name = toys.arrive(service, path, "task0")
        arrival = service.log.state.arrivals[name]
        assert arrival.status == "quarantined" and arrival.reasons[0].startswith("format.")
    assert not [*(tmp_path / "out").rglob("incoming/*")]
