"""A whole run that keeps no merge: the results of one that keeps all, and every model on request."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from merge_service.checkpoints import WEIGHTS_FILE, sha256_of
from tests.pipeline.run.test_run_stores import checkpoints
from tests.world import Cluster, World, command

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def lean(world: World, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of the tiny study with `storage.keep: none`."""
    out = tmp_path_factory.mktemp("lean") / "out"
    answer = command(
        "run", world.study(), "--out", out, "--address", cluster.address, "--set", "storage.keep=none"
    )
    assert answer.returncode == 0, answer.stderr
    return out


def merged(out: Path) -> list[Path]:
    return sorted((out / "store" / "merge").iterdir())


def digests(out: Path) -> dict[str, Any]:
    """The sha256 of every file of every artifact, as records state them."""
    found = {}
    for path in (out / "store").glob("*/*/record.json"):
        record = json.loads(path.read_text())
        found[record["fingerprint"]] = record["files"]
    return found


def test_results_and_records_are_those_of_a_run_that_keeps_all(lean: Path, undisturbed: Path) -> None:
    assert checkpoints(lean) == checkpoints(undisturbed)
    assert digests(lean) == digests(undisturbed)
    assert merged(lean) and not any((path / WEIGHTS_FILE).exists() for path in merged(lean))
    assert all((path / WEIGHTS_FILE).exists() for path in merged(undisturbed))
    assert [*(lean / "store" / ".stage").iterdir()] == []


def test_every_model_can_be_exported_with_the_sha256_of_its_record(
    lean: Path, undisturbed: Path, tmp_path: Path, cli
) -> None:
    for number, one in enumerate(json.loads((undisturbed / "results.json").read_text())["trajectories"]):
        for t in (1, len(one["stream"])):
            target = tmp_path / f"{number}-{t}"
            answer = cli("export", lean, "--trajectory", one["id"], "--t", str(t), "--out", target, "--json")
            assert answer.code == 0, answer.err
            said = json.loads(answer.out)
            step = one["steps"][t]
            assert said["sha256"] == (step["merged_sha256"] or step["expert_sha256"])
            assert sha256_of(target / WEIGHTS_FILE) == said["sha256"]
    assert not any((path / WEIGHTS_FILE).exists() for path in merged(lean))
    again = cli("export", lean, "--trajectory", one["id"], "--out", target)
    assert again.code == 2 and "exists" in again.err


def test_store_of_recipes_is_sound_and_every_recipe_can_be_made(lean: Path, cli) -> None:
    assert cli("verify", lean).code == 0
    answer = cli("verify", lean, "--deep", "--json")
    assert answer.code == 0 and json.loads(answer.out) == {"problems": []}


def test_plan_says_what_stays_and_what_all_would_take(world: World, tmp_path: Path, cli) -> None:
    every = json.loads(cli("plan", world.study(), "--out", tmp_path, "--json").out)
    lean = json.loads(
        cli("plan", world.study(), "--out", tmp_path, "--set", "storage.keep=none", "--json").out
    )
    assert (
        every["disk_bytes"]
        == every["disk_least_bytes"]
        == every["disk_peak_bytes"]
        == every["disk_all_bytes"]
        == lean["disk_all_bytes"]
    )
    assert lean["disk_bytes"] < lean["disk_least_bytes"] <= lean["disk_peak_bytes"]
    said = cli("plan", world.study(), "--out", tmp_path, "--set", "storage.keep=none").out
    assert "are used at most; storage.keep: all would take" in " ".join(said.split())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts file systems in memory of a fixed size, where this process may."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        place = tmp_path / f"disk-{len(mounted)}"
        place.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
        try:
            subprocess.run(words, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"nothing can be mounted here: {error}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_study_runs_where_one_merge_fits_at_a_time(
    undisturbed: Path,
    world: World,
    cluster: Cluster,
    tmp_path: Path,
    small_disk: Callable[[int], Path],
    cli,
) -> None:
    techniques = ["average", "task_arithmetic", "magmax"]
    strategy = {"init": "base", "deploy": "all", "technique": techniques}
    study = world.study(grid={"strategies": [strategy]}, storage={"keep": "none"})
    planned = json.loads(cli("plan", study, "--out", tmp_path / "out", "--json").out)
    (base,) = (undisturbed / "store" / "base").glob(f"*/{WEIGHTS_FILE}")
    disk = small_disk(planned["disk_least_bytes"] + base.stat().st_size + (1 << 20))
    answer = command(
        "run",
        study,
        "--out",
        tmp_path / "out",
        "--address",
        cluster.address,
        "--set",
        f"storage.store={disk}/store",
    )
    assert answer.returncode == 0, answer.stderr
    assert "stays as a file" not in answer.stderr
    records = [json.loads(path.read_text()) for path in (disk / "store").glob("merge/*/record.json")]
    assert len(records) == len(techniques) * 3 and not [*(disk / "store" / "merge").glob(f"*/{WEIGHTS_FILE}")]


def test_more_of_the_study_reads_the_merges_it_needs_and_keeping_all_makes_files_of_them(
    lean: Path, undisturbed: Path, world: World, cluster: Cluster
) -> None:
    again = command(
        "run", world.study(), "--out", lean, "--address", cluster.address,
        "--set", "storage.keep=none", "--set", "evaluation.fraction=0.5",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert not any((path / WEIGHTS_FILE).exists() for path in merged(lean))
    kept = command("run", world.study(), "--out", lean, "--address", cluster.address)
    assert kept.returncode == 0, kept.stderr
    wanted = {path.name for path in merged(undisturbed)}
    assert all((path / WEIGHTS_FILE).exists() for path in merged(lean) if path.name in wanted)
    assert checkpoints(lean) == checkpoints(undisturbed)


def test_gc_makes_recipes_of_a_finished_run(lean: Path, cli) -> None:
    said = json.loads(cli("gc", lean, "--keep", "final", "--dry-run", "--json").out)
    assert said["recipes"] and all(one["why"] is None for one in said["recipes"])
    freed = sum(one["bytes"] for one in said["recipes"])
    assert freed == 0  # the run that kept all gave them to MLflow, which has links
    answer = json.loads(cli("gc", lean, "--keep", "final", "--json").out)
    assert [one["place"] for one in answer["recipes"]] == [one["place"] for one in said["recipes"]]
    held = [path for path in merged(lean) if (path / WEIGHTS_FILE).exists()]
    assert 0 < len(held) < len(merged(lean)) and cli("verify", lean, "--deep").code == 0
    assert cli("gc", lean, "--keep", "some").code == 2


def test_packed_experts_are_read_by_export_and_unpacked_again(lean: Path, undisturbed: Path, cli) -> None:
    before = digests(lean)
    answer = json.loads(cli("pack", lean, "--json").out)
    assert answer["experts"] and not [one for one in answer["experts"] if one["why"]]
    assert all(one["after"] < one["before"] for one in answer["experts"])
    assert not [*(lean / "store" / "train").glob(f"*/{WEIGHTS_FILE}")]
    assert digests(lean) == before and cli("verify", lean, "--deep").code == 0
    again = json.loads(cli("pack", lean, "--undo", "--json").out)
    assert [one["after"] for one in again["experts"]] == [one["before"] for one in answer["experts"]]
    assert digests(lean) == before and cli("verify", lean).code == 0
    assert cli("pack", lean.parent / "nothing").code == 2
