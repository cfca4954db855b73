"""Experts that must not be merged: not finite, of another model, duplicate, or missing. Store and service stay unchanged."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE, Checkpoint, admit, check_finite, sha256_of
from merge_service.errors import (
    CheckpointError,
    ConflictingArrival,
    IncompatibleCheckpoint,
    NonFiniteCheckpoint,
)
from merge_service.merging import Member, MergeJob
from merge_service.service import Merger, MergeService
from merge_service.timelines import Strategy
from pipeline.store.local import Store
from tests.faults.fuzz import seeded
from tests.merge_service import toys
from tests.pipeline.store_toys import ToyStep

SEEDED = seeded(120)
pytestmark = pytest.mark.usefixtures("no_disk_sync")
Record = Callable[[str, object], None]
STRATEGY = Strategy("base", "all", "ties", {"density": 0.5})


@pytest.fixture
def stream(tmp_path: Path) -> list[Path]:
    """A base and three experts."""
    rng = np.random.default_rng(3)
    base = toys.towers(rng)
    models = [base, *(toys.moved(rng, base) for _ in range(3))]
    for t, model in enumerate(models):
        toys.save(tmp_path / f"{t}" / WEIGHTS_FILE, model)
        (tmp_path / f"{t}" / CONFIG_FILE).write_text("{}")
    return [tmp_path / f"{t}" for t in range(4)]


# --- F17: numbers that are none ------------------------------------------------------------------------------------------


@pytest.mark.fault("F17")
def test_value_that_is_not_finite_anywhere_in_any_format_is_counted_and_named(
    tmp_path: Path, record_property: Record
) -> None:
    path, seen = tmp_path / "w.safetensors", []
    sizes = st.sampled_from([1, 2, 7, 1000, (1 << 20) + 3])  # the last spans two blocks of the scan

    @SEEDED
    @given(
        size=sizes, places=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4),
        bad=st.sampled_from([np.nan, -np.nan, np.inf, -np.inf]), dtype=st.sampled_from(["F16", "BF16", "F32", "F64"]),
    )  # fmt: skip
    def check(size: int, places: list[float], bad: float, dtype: str) -> None:
        values = np.ones(size, np.float64 if dtype == "F64" else np.float32)
        rows = {int(place * size) for place in places}
        values[list(rows)] = bad
        kinds = {"fine": "F32", "w": dtype}
        toys.save(path, {"fine": toys.vector([1, 3e38, -3e38]), "w": values}, dtypes=kinds)
        with Checkpoint.open(path) as checkpoint, pytest.raises(NonFiniteCheckpoint) as caught:
            check_finite(checkpoint, "photos (t=3)")
        assert f"w has {len(rows)} of {size} values" in str(caught.value)
        assert "photos (t=3)" in str(caught.value) and "fine" not in str(caught.value)
        seen.append(dtype)

    check()
    record_property("cases", len(seen))


def merge_step(store: Store, stream: list[Path], scratch: Path, technique: str) -> tuple[MergeJob, ToyStep]:
    """A merge of all experts, in the form in which the pipeline passes it to the merge actor."""
    members = [Member(f"photos (t={t})", path, sha256_of(path)) for t, path in enumerate(stream)]
    fold = technique == "slerp"
    job = MergeJob(
        "merge", technique, {"weight": 0.5} if fold else {}, "fold" if fold else "merge", members[0],
        tuple(members[1:3] if fold else members[1:]), 1, str(scratch), str(scratch / "limits"),
    )  # fmt: skip
    return job, ToyStep("merge", spec={"technique": technique})


@pytest.mark.fault("F17")
@pytest.mark.parametrize("technique", ["average", "ties", "dare_ties", "magmax", "slerp"])
@pytest.mark.parametrize(
    "bad", [[np.nan] * 5, [1, np.inf, 2, 3, 4], [1, 2, -np.inf, 3, 4]], ids=["all NaN", "inf", "-inf"]
)
def test_merge_step_with_a_non_finite_expert_commits_nothing_and_does_when_it_is_mended(
    technique: str, bad: list[float], stream: list[Path], tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    store.prepare()
    good = toys.load(stream[2])
    toys.save(stream[2] / WEIGHTS_FILE, good | {"visual.ln_pre.bias": toys.vector(bad)})
    job, step = merge_step(store, stream, tmp_path / "scratch", technique)
    with pytest.raises(NonFiniteCheckpoint) as caught:
        Merger().run(job, step, store)
    assert "photos (t=2)" in str(caught.value) and "visual.ln_pre.bias has" in str(caught.value)
    assert not list((store.root / "merge").iterdir()) and not list((store.root / ".stage").iterdir())
    toys.save(stream[2] / WEIGHTS_FILE, good)
    job, step = merge_step(store, stream, tmp_path / "scratch", technique)
    assert store.open_verified(Merger().run(job, step, store)) and store.verify() == []


# --- F18: another model --------------------------------------------------------------------------------------------------


@pytest.mark.fault("F18")
def test_expert_with_any_one_tensor_changed_is_refused_by_that_tensor(
    stream: list[Path], tmp_path: Path, record_property: Record
) -> None:
    model, path, cases = toys.load(stream[1]), tmp_path / "other.safetensors", 0
    for name, value in model.items():
        others: dict[str, dict[str, np.ndarray]] = {
            "is missing": {other: tensor for other, tensor in model.items() if other != name},
            "is not in the reference": model | {f"{name}.more": value},
            "has shape": model | {name: np.zeros((*value.shape, 2), value.dtype)},
            "is ": model | {name: value.astype(np.float32 if value.dtype.kind in "bi" else np.int64)},
        }
        if name == "position_ids":  # 0, 1, 2, ..., which some libraries save and others do not
            del others["is missing"]
        if value.ndim == 2 and value.shape[0] != value.shape[1]:
            others["has shape ["] = model | {name: np.ascontiguousarray(value.T)}
        for says, other in others.items():
            toys.save(path, other)
            with (
                pytest.raises(IncompatibleCheckpoint) as caught,
                Checkpoint.open(stream[0]) as base,
                Checkpoint.open(path) as expert,
            ):
                admit(base, expert, "photos (t=3)")
            assert (
                "photos (t=3)" in str(caught.value)
                and name in str(caught.value)
                and says in str(caught.value)
            )
            cases += 1
    record_property("cases", cases)


@pytest.mark.fault("F18")
def test_refusal_stays_readable_however_much_differs(stream: list[Path], tmp_path: Path) -> None:
    other = toys.save(tmp_path / "w.safetensors", {f"{'n' * 290}{i}": toys.vector([i]) for i in range(500)})
    with MergeService(STRATEGY, stream[0], tmp_path / "scratch") as service:
        with pytest.raises(IncompatibleCheckpoint, match=r"and 50\d more") as caught:
            service.arrive(1, other)
        assert len(str(caught.value)) < 5000 and service.history() == ()


# --- F19 and F20: twice, late, never -------------------------------------------------------------------------------------


@pytest.mark.fault("F19")
def test_arrival_repeated_in_every_order_changes_no_byte_and_another_is_always_a_conflict(
    stream: list[Path], tmp_path: Path, record_property: Record
) -> None:
    cases = 0
    results = set()
    for order in itertools.permutations((1, 2, 3)):
        with MergeService(STRATEGY, stream[0], tmp_path / "scratch") as service:
            for t in order:
                service.arrive(t, stream[t])
                for again in order[: order.index(t) + 1]:
                    assert service.arrive(again, stream[again]) == []
                    with pytest.raises(ConflictingArrival) as caught:
                        service.arrive(again, stream[again % 3 + 1])
                    for path in (stream[again], stream[again % 3 + 1]):
                        assert sha256_of(path) in str(caught.value)
                    cases += 2
            results.add(sha256_of(service.deployed(3)))
    assert len(results) == 1
    record_property("cases", cases)


@pytest.mark.fault("F20")
@pytest.mark.parametrize("never", [1, 2, 3])
def test_expert_that_never_comes_is_named_and_what_came_before_it_stands(
    never: int, stream: list[Path], tmp_path: Path
) -> None:
    with MergeService(STRATEGY, stream[0], tmp_path / "scratch") as service:
        for t in (3, 2, 1):
            if t != never:
                service.arrive(t, stream[t])
        assert [moment.t for moment in service.history()] == list(range(1, never))
        assert [arrival.t for arrival in service.waiting()] == list(range(never + 1, 4))
        for t in range(never):
            assert service.deployed(t).exists()
        for t in range(never, 4):
            with pytest.raises(LookupError, match=f"expert of task {never} has not arrived"):
                service.deployed(t)


@pytest.mark.fault("F17", "F18", "F20")
def test_bad_expert_between_good_ones_stops_nobody_and_its_place_stays_free(
    stream: list[Path], tmp_path: Path
) -> None:
    model = toys.load(stream[2])
    bad = {
        "not finite": model | {"text_projection": np.full((4, 3), np.nan, np.float32)},
        "another shape": model | {"text_projection": np.zeros((3, 4), np.float32)},
        "cut": None,
    }
    with MergeService(STRATEGY, stream[0], tmp_path / "calm") as calm:
        for t in (1, 2, 3):
            calm.arrive(t, stream[t])
        expected = [sha256_of(calm.deployed(t)) for t in (1, 2, 3)]
    for what, tensors in bad.items():
        path = tmp_path / f"{what}.safetensors"
        if tensors is None:
            path.write_bytes((stream[2] / WEIGHTS_FILE).read_bytes()[:-5])
        else:
            toys.save(path, tensors)
        with MergeService(STRATEGY, stream[0], tmp_path / "scratch") as service:
            service.arrive(1, stream[1])
            with pytest.raises(CheckpointError):
                service.arrive(2, path)
            assert service.arrive(3, stream[3]) == [] and len(service.history()) == 1
            assert [moment.t for moment in service.arrive(2, stream[2])] == [2, 3]
            assert [sha256_of(service.deployed(t)) for t in (1, 2, 3)] == expected, what
