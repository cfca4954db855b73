"""A finished run of the tiny study: the files it left, and the answers of the commands about it."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from merge_service.merge import merge
from pipeline.workspace.lock import read_driver
from tests.world import ROOT, STRATEGIES, TASKS, Cluster, World, artifacts, command

pytestmark = pytest.mark.ray

STEP_KEYS = {
    "t", "task", "ka", "zs", "gm", "scores", "expert_sha256", "merged_sha256", "merge_seconds",
}  # fmt: skip
TRAJECTORY_KEYS = {"id", "init", "deploy", "technique", "params", "budget", "seed", "stream", "steps"}


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def trajectory(out: Path, name: str) -> dict[str, Any]:
    return next(one for one in results(out)["trajectories"] if one["id"].startswith(name))


def weights_of(out: Path, sha256: str) -> Path:
    """The directory of the artifact whose weights have this sha256."""
    for path in (out / "store").glob("*/*/record.json"):
        files = json.loads(path.read_text())["files"]
        if files.get("open_clip_model.safetensors", {}).get("sha256") == sha256:
            return path.parent
    raise AssertionError(f"no artifact holds {sha256}")


def test_results_json_has_the_stated_shape_with_the_base_at_t_zero(undisturbed: Path) -> None:
    found = results(undisturbed)["trajectories"]
    assert len(found) == 3
    for one in found:
        assert set(one) >= TRAJECTORY_KEYS
        assert [step["t"] for step in one["steps"]] == [0, 1, 2, 3]
        assert [step["task"] for step in one["steps"]][1:] == list(TASKS) == one["stream"]
        assert one["steps"][0]["scores"] == found[0]["steps"][0]["scores"]
        assert one["steps"][0]["expert_sha256"] is None
        for step in one["steps"]:
            assert set(step) >= STEP_KEYS
            assert set(step["scores"]) == {*TASKS, "grey"}
            assert all(0 <= score <= 1 for score in step["scores"].values())
            assert step["ka"] == pytest.approx(np.mean([step["scores"][task] for task in TASKS]), abs=1e-12)
            assert step["zs"] == step["scores"]["grey"]
            assert step["gm"] == pytest.approx((step["ka"] * step["zs"]) ** 0.5, abs=1e-12)
    for step in trajectory(undisturbed, "best_in_time")["steps"][2:]:
        assert step["merge_seconds"] >= 0 and step["merged_sha256"] != step["expert_sha256"]


def test_out_holds_the_stated_files_and_the_study_as_it_was_resolved(undisturbed: Path, cli) -> None:
    for name in ("study.yaml", "plan.json", "store", "mlflow.db", "mlartifacts", "results.json"):
        assert (undisturbed / name).exists(), name
    again = json.loads(cli("plan", undisturbed / "study.yaml", "--out", undisturbed, "--json").out)
    for counts in again["steps"].values():
        assert counts["cached"] == counts["unique"] <= counts["naive"]
    assert again["gflops"] == 0 and again["disk_bytes"] == 0


def test_status_of_a_finished_run_has_the_stated_shape(undisturbed: Path, cli) -> None:
    said = json.loads(cli("status", undisturbed, "--json").out)
    total = sum(1 for path in undisturbed.glob("store/*/*/record.json") if path.parts[-3] != "base")
    assert said["state"] == "done" and said["tracker_pending"] == 0
    assert said["steps"] == {"done": total, "running": 0, "failed": 0, "pending": 0}
    assert sum(kind["done"] for kind in said["kinds"].values()) == total
    assert {row["t"] for row in said["trajectories"]} == {3} and said["running"] == []
    shown = cli("status", undisturbed).out
    assert f"{undisturbed}: done\n" in shown and f"{total} of {total} steps done" in shown
    assert cli("status", undisturbed, "--watch").out.startswith(f"{undisturbed}: done ({total} done)\n")


def test_verify_passes_and_names_the_artifact_with_a_flipped_byte(
    undisturbed: Path, tmp_path: Path, cli
) -> None:
    assert cli("verify", undisturbed).code == 0
    copy = tmp_path / "copy"
    shutil.copytree(undisturbed, copy)
    assert json.loads(cli("verify", copy, "--json").out) == {"problems": []}
    path = next((copy / "store" / "merge").glob("*/open_clip_model.safetensors"))
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    answer = cli("verify", copy)
    assert answer.code == 1
    assert str(path.parent.relative_to(copy / "store")) in answer.out and "1 problems" in answer.out


def test_thresholds_that_merges_ask_for_are_kept_per_expert_and_outside_the_store(undisturbed: Path) -> None:
    steps = trajectory(undisturbed, "init_base-deploy_all-ties")["steps"][1:]
    kept = [json.loads(path.read_text()) for path in (undisturbed / "scratch" / "limits").iterdir()]
    assert {body["expert"]["sha256"] for body in kept} == {step["expert_sha256"] for step in steps}
    assert all(len(body["entries"]) == 1 for body in kept)
    base = next((undisturbed / "store" / "base").iterdir())
    ties = functools.partial(
        merge, "ties", {"density": 0.5}, base, keep_thresholds=undisturbed / "scratch" / "limits"
    )
    experts = [weights_of(undisturbed, step["expert_sha256"]) for step in steps]
    sha256 = {f"expert-{number}": step["expert_sha256"] for number, step in enumerate(steps, 1)}
    with tempfile.TemporaryDirectory() as room, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "merge_service.engine.survey.Surveyor.answer", lambda *_: pytest.fail("looked for thresholds")
        )
        ties(experts, Path(room) / "merged", sha256=sha256)


def test_evaluate_gives_what_results_json_says_to_the_last_digit(
    undisturbed: Path, world: World, cli
) -> None:
    for name in ("init_base-deploy_all-ties", "best_in_time"):
        step = trajectory(undisturbed, name)["steps"][-1]
        place = weights_of(undisturbed, step["merged_sha256"])
        said = json.loads(cli("evaluate", place, "--study", world.study(), "--json").out)
        assert said["scores"] == step["scores"]
        assert (said["ka"], said["zs"], said["gm"]) == (step["ka"], step["zs"], step["gm"])
    one = json.loads(cli("evaluate", place, "--study", world.study(), "--datasets", "red", "--json").out)
    assert one["scores"] == {"red": step["scores"]["red"]} and "ka" not in one


def test_averages_along_a_run_are_scored_as_evaluate_scores(
    undisturbed: Path, world: World, cli, tmp_path: Path
) -> None:
    step = trajectory(undisturbed, "best_in_time")["steps"][-1]
    place = shutil.copytree(weights_of(undisturbed, step["merged_sha256"]), tmp_path / "step-1")
    words = (
        "--windows",
        "1",
        "--shapes",
        "mean",
        "--out",
        tmp_path / "out",
        "--study",
        world.study(),
        "--json",
    )
    said = json.loads(cli("trajectory", place, *words).out)
    assert {name: one["gm"] for name, one in said["scores"].items()} == {
        "step-1": step["gm"],
        "mean-1": step["gm"],
    }


@pytest.mark.ray
def test_evaluate_of_a_root_needs_no_study_and_gives_the_same_scores(
    undisturbed: Path, world: World, cli: Any
) -> None:
    place = next((undisturbed / "store" / "merge").iterdir())
    of_study = json.loads(cli("evaluate", place, "--study", world.study(), "--json").out)
    line = ["evaluate", place, "--root", world.home / "data", "--set", f"data.cache={world.home / 'cache'}"]
    alone = json.loads(cli(*line, "--json", "--details", "all").out)
    assert alone["scores"] == of_study["scores"] and "gm" not in alone
    assert set(alone["details"]["red"]) == {"top5", "mean_per_class", "per_class", "confusion"}
    assert alone["details"]["red"]["top5"] == 1.0, "of three classes"
    shown = cli(*line, "--details", "mean_per_class,per_class,confusion", "--datasets", "red").out
    assert "mean per class" in shown and "red: classes, the worst first" in shown and "top-5" not in shown


def test_evaluate_refuses_weights_of_another_shape(
    undisturbed: Path, world: World, tmp_path: Path, cli
) -> None:
    place = next((undisturbed / "store" / "base").iterdir())
    shutil.copytree(place, tmp_path / "wide")
    config = tmp_path / "wide" / "open_clip_config.json"
    config.chmod(0o644)
    body = json.loads(config.read_text())
    body["model_cfg"]["vision_cfg"]["width"] = 48
    config.write_text(json.dumps(body))
    answer = cli("evaluate", tmp_path / "wide", "--study", world.study())
    assert answer.code == 2 and str(tmp_path / "wide") in answer.err, answer.err


def test_merged_checkpoint_opens_in_plain_open_clip_and_scores_the_same(
    undisturbed: Path, world: World
) -> None:
    import open_clip

    step = trajectory(undisturbed, "best_in_time")["steps"][-1]
    place = weights_of(undisturbed, step["merged_sha256"])
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{place}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{place}")
    model.eval()
    for name, score in step["scores"].items():
        images, labels, classes, templates = pictures(world.home / "data" / name / "test")
        prompts = [template.format(c=label) for label in classes for template in templates]
        with torch.no_grad():
            texts = model.encode_text(tokenizer(prompts), normalize=True)
            texts = texts.reshape(len(classes), len(templates), -1).mean(1)
            seen = model.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
            guesses = (seen @ torch.nn.functional.normalize(texts, dim=-1).T).argmax(1)
        assert (guesses == torch.tensor(labels)).float().mean().item() == pytest.approx(score, abs=1e-6)


def pictures(place: Path) -> tuple[list, list[int], list[str], list[str]]:
    """Images, labels, class names and prompts of a split, read without our code."""
    import io
    import tarfile

    from PIL import Image

    images, labels = [], []
    for shard in sorted(place.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                content = tar.extractfile(member).read()
                if member.name.endswith(".cls"):
                    labels.append(int(content))
                elif member.name.endswith(".png"):
                    images.append(Image.open(io.BytesIO(content)))
    classes = (place.parent / "classnames.txt").read_text().splitlines()
    templates = (place.parent / "zeroshot_classification_templates.txt").read_text().splitlines()
    assert len(images) == len(labels) > 0
    return images, labels, classes, templates


def test_finished_run_started_again_does_nothing_and_starts_no_cluster(
    undisturbed: Path, world: World, cli
) -> None:
    def stamps() -> dict[Path, int]:
        """When each file was written; only the study's registration may change."""
        files = [path for path in (undisturbed / "store").rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files if path.parent.name != ".studies"}

    before = stamps()
    # Nothing listens at this address, so a run that needed a cluster would fail.
    answer = command("run", world.study(), "--out", undisturbed, "--address", "127.0.0.1:1")
    assert answer.returncode == 0, answer.stderr
    assert "best_in_time" in answer.stdout and "temporal-merge ui" in answer.stdout
    told = json.loads(cli("run", world.study(), "--out", undisturbed, "--json").out)
    assert told["complete"] and told["tracker_pending"] == 0
    assert told["best"] in {row["group"] for row in told["standings"]}
    assert stamps() == before


@pytest.mark.fault("F2", "F4")
def test_scratch_that_a_killed_worker_left_of_a_finished_step_goes_with_the_next_run(
    undisturbed: Path, world: World, cli
) -> None:
    """A worker that is killed with its driver may have committed its expert without removing its checkpoints."""
    done = json.loads(next((undisturbed / "store" / "train").glob("*/record.json")).read_text())[
        "fingerprint"
    ]
    left = undisturbed / "scratch" / done / "checkpoints" / "step-000000002"
    left.mkdir(parents=True)
    answer = cli("run", world.study(), "--out", undisturbed, "--address", "127.0.0.1:1")
    assert answer.code == 0, answer.err
    assert not (undisturbed / "scratch" / done).exists()


def test_technique_added_to_a_finished_study_trains_no_expert(
    undisturbed: Path, world: World, cluster: Cluster, tmp_path: Path
) -> None:
    """Only merges and evaluations run: every expert exists already, for each initialization that uses no technique."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    experts = {path: path.stat().st_ino for path in (out / "store" / "train").iterdir()}
    more = [
        {"init": "base", "deploy": "all", "technique": "magmax"},
        {"preset": "continual_finetuning", "deploy": "ema", "technique": "average"},
    ]
    before = len((out / "timeline.jsonl").read_text().splitlines())
    answer = command(
        "run",
        world.study(grid={"strategies": [*STRATEGIES, *more]}),
        "--out",
        out,
        "--address",
        cluster.address,
    )
    assert answer.returncode == 0, answer.stderr
    assert {path: path.stat().st_ino for path in (out / "store" / "train").iterdir()} == experts
    lines = [json.loads(line) for line in (out / "timeline.jsonl").read_text().splitlines()[before:]]
    assert {line["kind"] for line in lines if "kind" in line} == {"merge", "evaluate"}
    assert "held another plan of study tiny ('tiny' in MLflow); changed: the grid" in answer.stderr
    assert f"note: {out} was moved or copied from {undisturbed}" in answer.stderr
    assert len(results(out)["trajectories"]) == 5 and results(out)["complete"]


def test_study_of_another_name_is_refused_on_the_same_out(undisturbed: Path, world: World, cli) -> None:
    before = (undisturbed / "plan.json").read_bytes()
    answer = cli("run", world.study(name="other"), "--out", undisturbed)
    assert answer.code == 2 and answer.err.count("\n") == 1
    assert "'tiny'" in answer.err and "'other'" in answer.err and "another --out" in answer.err
    assert (undisturbed / "plan.json").read_bytes() == before


@pytest.mark.slow
def test_expert_that_diverges_ends_the_run_with_its_task_and_t(
    world: World, cluster: Cluster, tmp_path: Path, cli
) -> None:
    out = tmp_path / "out"
    # Weight decay multiplies every weight by 1 - lr * weight_decay = -99 a step: soon not finite.
    recipe = {
        "lr": 10.0,
        "weight_decay": 10.0,
        "warmup": 0.0,
        "min_lr_ratio": 1.0,
        "batch_size": 12,
        "precision": "fp32",
    }
    study = world.study(
        recipe=recipe, grid={"strategies": ["offline_merging"]}, budget={"steps_per_task": 40}
    )
    answer = command("run", study, "--out", out, "--address", cluster.address)
    assert answer.returncode == 2, answer.stderr
    assert "Traceback" not in answer.stderr
    error = answer.stderr.splitlines()[-1]
    assert re.match(
        r"error: task '(red|green|blue)' \(t=[123]\): the .* is (nan|inf) at step \d+ of 40", error
    ), error
    assert "Lower recipe.lr" in error and not list((out / "store" / "merge").iterdir())
    assert json.loads(cli("status", out, "--json").out)["state"] == "failed"


@pytest.mark.fault("F31")
@pytest.mark.slow
def test_interrupted_run_ends_with_130_and_its_rerun_finishes(
    world: World, cluster: Cluster, undisturbed: Path, tmp_path: Path, cli
) -> None:
    out = tmp_path / "out"
    line = [sys.executable, "-m", "pipeline.cli", "run", str(world.study()), "--out", str(out)]
    driver = subprocess.Popen(
        [*line, "--address", cluster.address], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"RAY_AUTH_MODE": "token"},
    )  # fmt: skip
    while not read_driver(out).get("running"):
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.05)
    while not (running := json.loads(cli("status", out, "--json").out))["steps"]["running"]:
        assert driver.poll() is None, running  # between two steps
    assert running["state"] == "running"
    driver.send_signal(signal.SIGINT)
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == 130, said
    assert "Traceback" not in said
    assert json.loads(cli("status", out, "--json").out)["state"] == "partial"
    answer = command("run", world.study(), "--out", out, "--address", cluster.address)
    assert answer.returncode == 0, answer.stderr
    assert artifacts(out) == artifacts(undisturbed)
