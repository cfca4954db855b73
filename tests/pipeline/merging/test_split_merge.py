"""`temporal-merge merge --workers` on a Ray cluster: the bytes of the merge in one process, its errors, and a lost worker."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from merge_service.merge import merge
from tests.world import Cluster, command


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """A base and three experts, so large that ranks need counting."""
    rng, written = np.random.default_rng(0), []
    base = {name: rng.normal(size=(300, 300)).astype(np.float32) for name in ("visual.proj", "text", "head")}
    for number in range(4):
        moved = {
            name: value + 0.1 * rng.normal(size=value.shape).astype(np.float32)
            for name, value in base.items()
        }
        written.append(tmp_path / f"{number}.safetensors")
        save_file(moved if number else base, written[-1])
    return written


def arguments(files: list[Path], cluster: Cluster, out: Path) -> list[object]:
    base, *experts = files
    where = ["--workers", 2, "--address", cluster.address]
    return ["merge", "--technique", "ties", "--base", base, *where, "--out", out, *experts]


@pytest.mark.ray
def test_two_ray_workers_write_the_bytes_of_one_process(
    files: list[Path], cluster: Cluster, tmp_path: Path
) -> None:
    out, alone = tmp_path / "out.safetensors", tmp_path / "alone.safetensors"
    answer = command(*arguments(files, cluster, out), "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["experts"] == 3
    merge("ties", {}, files[0], files[1:], alone)
    assert out.read_bytes() == alone.read_bytes()


@pytest.mark.ray
def test_mistake_that_a_ray_worker_finds_ends_with_code_2_and_its_one_line(
    files: list[Path], cluster: Cluster, tmp_path: Path
) -> None:
    save_file(
        {name: np.full((300, 300), np.inf, np.float32) for name in ("visual.proj", "text", "head")}, files[2]
    )
    out = tmp_path / "out.safetensors"
    answer = command(*arguments(files, cluster, out))
    assert answer.returncode == 2, answer.stderr
    assert (
        answer.stderr.startswith("error: ")
        and f"({files[2]})" in answer.stderr
        and answer.stderr.count("\n") == 1
    )
    assert "visual.proj has 90000 of 90000 values NaN or infinite" in answer.stderr
    assert not out.exists() and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.ray
def test_ray_worker_killed_while_it_merges_leaves_the_output_as_it_was(
    files: list[Path], cluster: Cluster, tmp_path: Path
) -> None:
    out, marker = tmp_path / "out.safetensors", tmp_path / "killed"
    out.write_bytes(b"what was there")
    answer = command(
        *arguments(files, cluster, out),
        "--force",
        faults={"merge.part": {"marker": str(marker)}},
        timeout=120,
    )
    assert marker.exists() and answer.returncode == 1, answer.stderr
    assert "a merge worker died" in answer.stderr and "run it again" in answer.stderr
    assert out.read_bytes() == b"what was there" and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.ray
def test_more_workers_than_the_cluster_has_places_for_are_refused_at_once(
    files: list[Path], cluster: Cluster, tmp_path: Path
) -> None:
    answer = command(*arguments(files, cluster, tmp_path / "out.safetensors"), "--threads", 2)
    assert answer.returncode == 2, answer.stderr
    assert "2 merge workers of 2 threads do not fit into the 2 CPUs" in answer.stderr
