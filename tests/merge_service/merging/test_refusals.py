"""Inputs that must be refused: by name, before anything is written, with nothing left behind."""

from pathlib import Path

import numpy as np
import pytest

from merge_service.errors import (
    CheckpointError,
    CorruptCheckpoint,
    IncompatibleCheckpoint,
    NonFiniteCheckpoint,
    TechniqueError,
)
from merge_service.merge import advance, merge, retract
from merge_service.merging import Rules
from tests.merge_service import measured, toys
from tests.merge_service.toys import Files


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.mark.fault("F17")
@pytest.mark.parametrize(("bad", "threads"), [(np.nan, 1), (np.inf, 3), (-np.inf, 1)])
@pytest.mark.parametrize("name", measured.GIVEN)
def test_a_non_finite_expert_stops_the_merge_and_touches_nothing(
    files: Files, name: str, bad: float, threads: int
) -> None:
    files.out.write_text("old")
    broken = files.experts[1] | {"visual.ln_pre.bias": toys.vector([1, bad, 2, 3, 4])}
    toys.save(files.paths[1], broken)
    with pytest.raises(NonFiniteCheckpoint) as caught:
        files.merge(name, ids=["animals (t=1)", "photos (t=2)"], threads=threads)
    assert "photos (t=2)" in str(caught.value) and "visual.ln_pre.bias has 1 of 5 values" in str(caught.value)
    assert files.out.read_text() == "old" and not list(files.room.glob(".*"))


@pytest.mark.fault("F18")
@pytest.mark.parametrize("change", ["missing", "extra", "shape", "transposed", "kind"])
def test_an_expert_of_another_architecture_is_refused_by_name(files: Files, change: str) -> None:
    other = dict(files.experts[1])
    tensor = "token_embedding.weight"
    if change == "missing":
        del other[tensor]
    elif change == "extra":
        tensor = "visual.extra"
        other[tensor] = toys.vector([1])
    else:
        other[tensor] = {
            "shape": np.zeros((4, 4), np.float32),
            "transposed": np.zeros((4, 3), np.float32),
            "kind": np.zeros((3, 4), np.int64),
        }[change]
    toys.save(files.paths[1], other)
    with pytest.raises(IncompatibleCheckpoint) as caught:
        files.merge("ties", ids=["animals (t=1)", "photos (t=2)"])
    assert "photos (t=2)" in str(caught.value) and tensor in str(caught.value) and not files.out.exists()


@pytest.mark.fault("F17")
def test_a_result_that_the_stored_type_cannot_hold_is_refused(tmp_path: Path) -> None:
    base = toys.save(tmp_path / "b.safetensors", {"w": np.zeros(3, np.float16)})
    new = toys.save(tmp_path / "e.safetensors", {"w": np.full(3, 60000, np.float16)})
    with pytest.raises(NonFiniteCheckpoint, match="values in w that F16 cannot hold"):
        merge("task_arithmetic", {"scale": 2}, base, [new], tmp_path / "o.safetensors")
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "params", "says"),
    [
        ("dare-ties", {}, "did you mean dare_ties"),
        ("os.system", {}, "unknown technique 'os.system'"),
        ("ties", {"density": 2}, "density = 2 is not a number of: 0 < x <= 1"),
        ("ties", {"density": 0}, "density = 0"),
        ("ties", {"density": float("nan")}, "density = nan"),
        ("ties", {"density": "0.2"}, "density = '0.2'"),
        ("ties", {"density": True}, "density = True"),
        ("task_arithmetic", {"scale": 10**400}, "scale = 1000"),
        ("ties", {"densty": 0.2}, "no parameter 'densty'; did you mean density"),
        ("ties", {"consensus": "median"}, "mean | sum | max"),
        ("dare_ties", {"seed": 1.5}, "seed = 1.5 is not a whole number"),
        ("breadcrumbs_ties", {"density": 0.95, "outliers": 0.1}, "more than everything"),
        ("average", {"weights": [1]}, "weights has 1 entries but there are 2 experts"),
        ("average", {"weights": [0, 0]}, "no weight above zero"),
        ("average", {"weights": [1, -1]}, "weights ="),
        ("average", {"weights": [1, 2], "schedule": "linear"}, "not both"),
        ("average", {"weights": b"xy"}, "is not a list of numbers"),
        ("average", {"weights": {0.5, 1.0}}, "is not a list of numbers"),
        ("average", {"weights": {0.5: 1, 1.0: 2}}, "is not a list of numbers"),
        ("average", {"weights": np.array(0.5)}, "is not a list of numbers"),
        ("ties", {"consensus": np.array([1.0, 2.0])}, "is not one of: mean | sum | max"),
        ("ties", {"density": np.bool_(True)}, "is not a number"),
        ("average", {"weight": 0.3}, "weight has no effect when the form is merge"),
        ("lines_ties", {"scale": 1}, "no parameter 'scale'"),
    ],
)
def test_a_wrong_technique_or_parameter_is_named(files: Files, name: str, params: dict, says: str) -> None:
    with pytest.raises(TechniqueError) as caught:
        files.merge(name, params)
    assert says in str(caught.value) and len(str(caught.value)) < 700 and not files.out.exists()


def test_numbers_of_numpy_are_numbers(files: Files) -> None:
    files.merge("ties", {"density": np.float32(0.5)})
    first = files.out.read_bytes()
    files.merge("ties", {"density": 0.5})
    assert files.out.read_bytes() == first
    files.merge("average", {"weights": np.array([1, 3], np.int32)})


def test_nan_of_the_base_is_said_although_another_tensor_is_made_first(tmp_path: Path) -> None:
    numbers = np.arange(9, dtype=np.float32).reshape(3, 3)
    bad = toys.save(tmp_path / "b.safetensors", {"a": numbers, "z": np.full((2, 2), np.nan, np.float32)})
    paths = [
        toys.save(tmp_path / f"{i}.safetensors", {"a": numbers * i, "z": np.ones((2, 2), np.float32)})
        for i in (1.1, 1.2)
    ]
    with pytest.raises(NonFiniteCheckpoint, match=r"the base .*z has 4 of 4 values NaN"):
        merge("pcb", {}, bad, paths, tmp_path / "o.safetensors", rules=Rules(any_base=True))


def test_forms_and_numbers_of_experts_that_do_not_exist_are_refused(files: Files) -> None:
    with pytest.raises(TechniqueError, match="give the base"):
        merge("ties", {}, None, files.paths, files.out)
    with pytest.raises(TechniqueError, match="merges exactly 2 checkpoints, not 1"):
        merge("slerp", {}, files.start, files.paths[:1], files.out)
    with pytest.raises(TechniqueError, match="slerp has no stream form"):
        advance(
            "slerp", {}, files.start, files.paths[0], None, expert_id="a", state_in=None, state_out=files.out
        )
    with pytest.raises(TechniqueError, match="nothing to merge"):
        merge("average", {}, None, [], files.out)


@pytest.mark.fault("F18")
def test_a_state_is_continued_only_with_what_it_was_started_with(files: Files) -> None:
    state, after = files.room / "state.safetensors", files.room / "after.safetensors"

    def go(name="ties", params=None, base=files.start, state_in=state) -> None:
        params = {"density": 0.5} if params is None else params
        advance(name, params, base, files.paths[1], None, expert_id="b", state_in=state_in, state_out=after)

    advance(
        "ties",
        {"density": 0.5},
        files.start,
        files.paths[0],
        None,
        expert_id="a",
        state_in=None,
        state_out=state,
    )
    go()
    with pytest.raises(TechniqueError, match="another params"):
        go(params={"density": 0.4})
    with pytest.raises(TechniqueError, match="another technique"):
        go("magmax", {})
    with pytest.raises(TechniqueError, match="another base"):
        go(base=files.paths[0])
    with pytest.raises(CorruptCheckpoint, match="not the state of a streaming merge"):
        go(state_in=files.start)


@pytest.mark.fault("F17")
def test_a_non_finite_expert_leaves_no_state_behind(files: Files) -> None:
    toys.save(files.paths[0], files.experts[0] | {"visual.ln_pre.bias": toys.vector([1, 2, 3, 4, np.nan])})
    before = sorted(files.room.iterdir())
    for name in ("average", "ties", "dare_ties", "magmax"):
        with pytest.raises(NonFiniteCheckpoint, match=r"photos \(t=1\)"):
            advance(name, {}, files.start, files.paths[0], files.out, expert_id="photos (t=1)", state_in=None,
                    state_out=files.room / "state.safetensors")  # fmt: skip
    assert sorted(files.room.iterdir()) == before


def test_state_of_a_stream_replaces_no_input_and_no_model_a_state(files: Files, tmp_path: Path) -> None:
    base, (one, two) = files.start, files.paths[:2]
    given = {path: path.read_bytes() for path in (base, one, two)}
    state, out = tmp_path / "state.safetensors", tmp_path / "new.safetensors"

    def add(expert: Path, place: Path | None, after: Path, before: Path | None = state) -> None:
        advance("ties", {}, base, expert, place, expert_id=expert.stem, state_in=before, state_out=after)

    def leave(after: Path) -> None:
        retract("ties", {}, base, one, None, expert_id=one.stem, state_in=state, state_out=after)

    add(one, None, state, None)
    for lost in (
        lambda: add(two, None, base),
        lambda: add(two, None, two),
        lambda: leave(base),
        lambda: leave(one),
    ):
        with pytest.raises(CheckpointError, match=r"state_out .*is one of the inputs and would be lost"):
            lost()
    for place, after in ((out, out), (state, out)):
        with pytest.raises(CheckpointError, match="is the place of the state"):
            add(two, place, after)
    assert {path: path.read_bytes() for path in given} == given
    add(two, out, state)  # a state goes on in its own place
