"""Averages along a run: the weights of shapes, one pass over the checkpoints, and the same bytes after a stop."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from merge_service.checkpoints.checkpoint import Checkpoint
from merge_service.checkpoints.writer import CheckpointWriter
from merge_service.errors import IncompatibleCheckpoint, NonFiniteCheckpoint, TechniqueError
from merge_service.trajectories import (
    SHAPES,
    Places,
    average_along,
    averages_of,
    in_order,
    passing,
    weights_of,
)
from tests.merge_service.toys import load, save

COUNT = 6


@pytest.fixture
def run(tmp_path: Path) -> list[Path]:
    """Six checkpoints of a run, one number of which never changes."""
    rng = np.random.default_rng(0)
    start = {
        "a": rng.normal(size=(50, 3)).astype(np.float32),
        "b": rng.normal(size=7).astype(np.float32),
        "n": np.arange(3),
    }
    paths = []
    for step in range(COUNT):
        start = {
            **start,
            "a": start["a"] + rng.normal(size=(50, 3)).astype(np.float32) / 10,
            "n": start["n"] + 1,
        }
        paths.append(save(tmp_path / f"step-{100 * (step + 1)}.safetensors", start))
    return paths


def made(paths: list[Path], out: Path, shapes=tuple(SHAPES), **options) -> dict[str, Path]:
    averages = averages_of(paths, [2, 4, 6], shapes, options.pop("every", False))
    return dict(average_along(paths, averages, Places(out, **options), threads=2).paths)


@pytest.mark.parametrize("shape", [*SHAPES, "ema:0.3"])
@pytest.mark.parametrize("window", [1, 2, 5, 16])
def test_weights_are_positive_and_add_up_to_one(shape: str, window: int) -> None:
    weights = weights_of(shape, window)
    assert len(weights) == window and min(weights) > 0 and math.fsum(weights) == pytest.approx(1, abs=1e-12)


def test_weights_stand_for_the_decays_that_they_are_named_after() -> None:
    window = 8
    decays = {
        "mean": [1 - j / window for j in range(window)],
        "1-sqrt": [1 - math.sqrt(j / window) for j in range(window)],
        "cosine": [(1 + math.cos(math.pi * j / window)) / 2 for j in range(window)],
        "linear": [1 - j * (j + 1) / (window * (window + 1)) for j in range(window)],
        "ema:0.2": [1.0, *(1 - 0.8 ** (window - j) for j in range(1, window))],
    }
    for shape, decay in decays.items():
        weights = weights_of(shape, window)
        assert [math.fsum(weights[j:]) for j in range(window)] == pytest.approx(decay, abs=1e-12), shape


def test_ema_is_the_recursion() -> None:
    values, found = [3.0, 1.0, 4.0, 1.5], 3.0
    for value in values[1:]:
        found = 0.4 * value + 0.6 * found
    assert np.dot(weights_of("ema", 4), values) == pytest.approx(found)


def test_every_average_is_the_weighted_sum_in_float64(run: list[Path], tmp_path: Path) -> None:
    held = [load(path) for path in run]
    for name, path in made(run, tmp_path / "out").items():
        shape, _, window = name.rpartition("-")
        last = held[-int(window) :]
        wanted = sum(w * one["a"].astype(np.float64) for w, one in zip(weights_of(shape, int(window)), last))
        np.testing.assert_allclose(load(path)["a"], wanted, rtol=0, atol=2e-7)
        assert np.array_equal(load(path)["b"], held[-1]["b"])
        assert np.array_equal(load(path)["n"], held[-1]["n"])


def test_averages_at_every_checkpoint_are_those_of_shorter_runs(run: list[Path], tmp_path: Path) -> None:
    every = made(run, tmp_path / "every", every=True)
    assert len(every) == len(SHAPES) * (5 + 3 + 1)
    short = average_along(run[:3], averages_of(run[:3], [2], ["ema"]), Places(tmp_path / "short"))
    assert every["ema-2-at-300"].read_bytes() == short.paths["ema-2"].read_bytes()


def test_each_checkpoint_is_read_once(
    run: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count: dict[str, int] = {}
    read = Checkpoint.read

    def counted(self: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        if stop is not None and passes:
            count[self.path.name] = count.get(self.path.name, 0) + (stop - start)
        return read(self, name, start, stop)

    passes: list[int] = []
    make = passing._make_files
    monkeypatch.setattr(Checkpoint, "read", counted)
    monkeypatch.setattr(passing, "_make_files", lambda *given: (passes.append(1), make(*given))[1])
    made(run, tmp_path / "out")
    assert count == {path.name: 157 for path in run}


def test_bytes_do_not_depend_on_blocks_and_threads(
    run: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(run, tmp_path / "whole")
    monkeypatch.setattr(passing, "BLOCK", 11)
    for name, path in made(run, tmp_path / "blocks").items():
        assert path.read_bytes() == whole[name].read_bytes()


def test_pass_that_was_stopped_goes_on_and_gives_the_same_bytes(
    run: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(run, tmp_path / "whole", shard_bytes=100)
    settle, settled = CheckpointWriter.settle, []

    def until_the_tenth(self: CheckpointWriter) -> None:
        settled.append(self.path)
        if len(settled) == 10:
            raise KeyboardInterrupt
        settle(self)

    monkeypatch.setattr(CheckpointWriter, "settle", until_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        made(run, tmp_path / "again", shard_bytes=100)
    assert not list((tmp_path / "again").glob("*.json")) and not list((tmp_path / "again").glob(".*"))
    monkeypatch.undo()
    averages = averages_of(run, [2, 4, 6], tuple(SHAPES))
    report = average_along(run, averages, Places(tmp_path / "again", 100))
    assert (report.kept, report.written + report.kept) == (9, 3 * len(SHAPES) * 2)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert {path.name for path in report.paths.values()} == {path.name for path in whole.values()}


def test_other_checkpoints_make_all_files_anew(run: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(run[:-1] + run[-1:], out, ("mean",))
    save(run[0], {**load(run[0]), "a": np.zeros((50, 3), np.float32), "n": np.arange(3)})
    report = average_along(run, averages_of(run, [2, 4, 6], ["mean"]), Places(out))
    assert (report.written, report.kept) == (1, 2)
    record = json.loads(Checkpoint.open(report.paths["mean-4"]).metadata["temporal_merge"])
    assert (record["window"], [one["step"] for one in record["inputs"]]) == (4, [300, 400, 500, 600])


def test_mean_in_another_dtype_is_rounded_once(run: list[Path], tmp_path: Path) -> None:
    path = made(run, tmp_path / "out", ("mean",), dtype="F16")["mean-2"]
    exact = (load(run[-1])["a"].astype(np.float64) + load(run[-2])["a"]) / 2
    assert Checkpoint.open(path).tensors["a"].dtype == "F16"
    np.testing.assert_allclose(load(path)["a"], exact.astype(np.float16), rtol=1e-3)


def test_order_is_that_of_the_steps_in_names(tmp_path: Path) -> None:
    given = [tmp_path / "checkpoint-1000", tmp_path / "checkpoint-200"]
    assert in_order(given) == given[::-1]
    named = [tmp_path / "b.safetensors", tmp_path / "a.safetensors"]
    assert in_order(named) == named
    with pytest.raises(TechniqueError, match="both of step 7"):
        in_order([tmp_path / "x-7", tmp_path / "y-07"])


def test_refused_are_windows_shapes_and_checkpoints_that_do_not_fit(run: list[Path], tmp_path: Path) -> None:
    for windows, shapes, said in (
        ([7], ["mean"], "needs 7 checkpoints, and there are 6"), ([0], ["mean"], "holds nothing"),
        ([2, 2], ["mean"], "given twice"), ([2], ["sqrt"], "no shape 'sqrt'"), ([2], ["ema:1"], "between 0 and 1"),
    ):  # fmt: skip
        with pytest.raises(TechniqueError, match=said):
            averages_of(run, windows, shapes)
    other = save(tmp_path / "step-50.safetensors", {"a": np.zeros((50, 3), np.float32)})
    with pytest.raises(IncompatibleCheckpoint, match="step-50"):
        average_along([other, *run], averages_of([other, *run], [7], ["mean"]), Places(tmp_path / "out"))
    bad = save(
        tmp_path / "step-700.safetensors",
        {**load(run[-1]), "b": np.full(7, np.nan, np.float32), "n": np.arange(3)},
    )
    with pytest.raises(NonFiniteCheckpoint, match=r"step-700.*b has values NaN"):
        average_along([*run, bad], averages_of([*run, bad], [2], ["mean"]), Places(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.safetensors"))
