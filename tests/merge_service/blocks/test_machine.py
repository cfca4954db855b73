"""Compiled loops are loaded from code that an earlier process left, and only from whole code of the same sources."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from merge_service.blocks import loops, machine
from tests.merge_service.toys import Files


def test_merge_starts_neither_the_compiler_nor_scipy(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.merge("ties", ids=["a", "b"])  # from here on the loops are compiled
    code = (
        "import sys; from merge_service.merge import merge; _, base, one, two, out = sys.argv; "
        "merge('ties', {}, base, [one, two], out, ids=['a', 'b']); "
        "print([name for name in ('numba', 'scipy', 'torch', 'ray', 'pydantic') if name in sys.modules])"
    )
    words = [sys.executable, "-c", code, files.start, *files.paths, tmp_path / "again.safetensors"]
    answer = subprocess.run([*map(str, words)], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
    assert (tmp_path / "again.safetensors").read_bytes() == files.out.read_bytes()


def test_code_that_is_not_whole_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_places", lambda: (tmp_path / "none", tmp_path / "cache"))
    monkeypatch.setattr(machine, "_compiled", lambda name: b"code of " + name.encode())
    (tmp_path / "none").write_text("a file where a directory is wanted")
    assert machine._kept("tally") is None
    machine._made("tally")
    assert machine._kept("tally") == b"code of tally"
    (kept,) = (tmp_path / "cache").iterdir()
    whole = kept.read_bytes()
    for damaged in (whole[:-1], whole[1:], b"", whole[:64], whole[:-1] + b"?"):
        kept.write_bytes(damaged)
        assert machine._kept("tally") is None


def test_code_of_other_sources_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loop's file is named by what decides its code."""
    before = machine._file("blend")
    monkeypatch.setattr("llvmlite.__version__", "another")
    machine._identity.cache_clear()
    try:
        assert machine._file("blend") != before
    finally:
        monkeypatch.undo()
        machine._identity.cache_clear()
    assert machine._file("blend") == before


@pytest.mark.parametrize("size", [1, loops.LANES - 1, loops.LANES, 3 * loops.LANES + 7])
@pytest.mark.parametrize("ends", [(0, 0), (3, 5), (0, 40), (39, 39), (50, 60)])
def test_magnitudes_are_counted_alike_in_whole_blocks_and_in_the_rest(
    size: int, ends: tuple[int, int]
) -> None:
    rng = np.random.default_rng(size)
    base = rng.integers(-20, 21, size).astype(np.float32)
    expert = rng.integers(-20, 21, size).astype(np.float32)
    bits = np.abs(expert - base).view(np.uint32)
    low, high = (int(np.float32(end).view(np.uint32)) for end in ends)
    job, terms = np.zeros(1, loops.JOB), np.zeros(1, loops.TERM)
    job["size"], job["base"], terms["address"] = size, base.ctypes.data, expert.ctypes.data
    windows = loops.Windows(
        np.array([low], np.uint32), np.array([high], np.uint32), np.zeros(1, np.uint32), np.zeros(1, np.int64),
        np.zeros(1, np.int64),
    )  # fmt: skip
    chosen, owners = np.empty(8 * loops.LANES, np.uint32), np.empty(8 * loops.LANES, np.uint16)
    at, found, below = loops.sift_span(job, terms, windows, 0, chosen, owners)
    inside = bits[(bits >= low) & (bits <= high)]
    assert (at, below.tolist()) == (size, [int((bits < low).sum())])
    assert sorted(chosen[:found].tolist()) == sorted(inside.tolist())
    for width in (np.uint32, np.uint64):
        words = bits.astype(width)
        assert loops.sift(words, low, high, np.empty(size, width)) == (int((bits < low).sum()), inside.size)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["base", "expert"])
def test_numbers_that_are_not_finite_are_found_while_magnitudes_are_counted(value: float, which: str) -> None:
    both = {"base": np.zeros(loops.LANES, np.float32), "expert": np.ones(loops.LANES, np.float32)}
    both[which][5] = value
    job, terms = np.zeros(1, loops.JOB), np.zeros(1, loops.TERM)
    job["size"], job["base"], terms["address"] = (
        loops.LANES,
        both["base"].ctypes.data,
        both["expert"].ctypes.data,
    )
    none = np.zeros(1, np.uint32)
    windows = loops.Windows(none, none, none, np.zeros(1, np.int64), np.zeros(1, np.int64))
    loops.sift_span(
        job, terms, windows, 0, np.empty(8 * loops.LANES, np.uint32), np.empty(8 * loops.LANES, np.uint16)
    )
    assert (bool(job["bad"][0]), bool(terms["bad"][0])) == (which == "base", which == "expert")
