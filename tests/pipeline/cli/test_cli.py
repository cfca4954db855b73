"""The command line without a run: help, techniques, and mistakes about studies and directories."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from safetensors.numpy import save_file

from merge_service import techniques
from pipeline.cli.app import PANELS, app
from pipeline.cli.files import technique_names
from pipeline.workspace.lock import driver_lock
from tests.world import World, command

COMMANDS = tuple(function.__name__.replace("_", "-") for commands in PANELS.values() for function in commands)


def refused(answer: Any, *says: str) -> None:
    """The answer of a command that refuses: code 2, one message of one line on stderr, nothing on stdout."""
    code, out, err = (
        tuple(answer) if isinstance(answer, tuple) else (answer.returncode, answer.stdout, answer.stderr)
    )
    assert code == 2, (code, err)
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert "Traceback" not in err
    assert all(word in err for word in says), err


def strategies(**strategy: Any) -> dict[str, Any]:
    return {"strategies": [{"init": "base", "deploy": "all", **strategy}]}


def damaged(world: World, room: Path, shard: str, flip: bool) -> tuple[dict[str, Any], Path]:
    """The data section of a copy of the world's data in which one shard is gone or has a flipped bit; and that shard."""
    root = room / "data"
    shutil.copytree(world.home / "data", root)
    path = root / shard
    content = bytearray(path.read_bytes())
    path.unlink()
    if flip:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    cache = str(world.home / "cache")
    return {"root": str(root), "pretraining": ["grey"], "held_out": ["grey"], "cache": cache}, path


def test_help_names_every_command_by_what_it_is_for() -> None:
    said = command("--help")
    assert said.returncode == 0 and said.stderr == ""
    places = [said.stdout.index(panel) for panel in PANELS]
    assert places == sorted(places)
    for name in COMMANDS:
        assert f" {name} " in said.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_an_example_that_the_command_line_takes(name: str, cli) -> None:
    answer = cli(name, "--help")
    assert answer.code == 0 and "Usage: " in answer.out and "Example: " in answer.out
    one = typer.main.get_command(app).commands[name]
    words = shlex.split(one.help.rpartition("Example: ")[2])
    assert words[:2] == ["temporal-merge", name]
    one.make_context(name, words[2:])  # raises on what it does not know
    assert any("--json" in parameter.opts for parameter in one.params), "an answer for programs too"


def test_technique_names_are_completed(cli) -> None:
    assert technique_names("ti") == ["ties", "tinting"]
    assert set(technique_names("")) == set(techniques.names())


def test_sync_and_ui_answer_programs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("pipeline.workspace.opening.open_store", lambda out: None)
    monkeypatch.setattr("pipeline.tracking.tracker.ui_command", lambda out, port: ["mlflow", str(port)])
    monkeypatch.setattr("pipeline.tracking.tracker.ui_url", lambda out, port: f"http://127.0.0.1:{port}/x")
    monkeypatch.setattr("pipeline.tracking.tracker.sync", lambda out, say: (2, "it is down"))
    monkeypatch.setattr("pipeline.tracking.mlflow.ui_server.check_port", lambda port: None)
    monkeypatch.setattr(
        "pipeline.tracking.mlflow.ui_server.serve",
        lambda command, url, ready: (started.append(command), ready(), 0)[-1],
    )
    assert json.loads(cli("ui", tmp_path, "--port", "5012", "--json").out) == {
        "url": "http://127.0.0.1:5012/x"
    }
    assert started == [["mlflow", "5012"]]
    answer = cli("sync", tmp_path, "--json")
    assert answer.code == 1 and json.loads(answer.out) == {"tracker_pending": 2, "reason": "it is down"}


def test_errors_have_no_colours_where_there_is_no_terminal(cli) -> None:
    assert "\x1b" not in cli("techniques", "tys").err


@pytest.mark.parametrize("line", ["runn", "run --outt x", "status", "evaluate"])
def test_wrong_usage_ends_with_code_two_and_points_to_help(line: str, cli) -> None:
    answer = cli(*line.split())
    assert answer.code == 2 and "Usage:" in answer.err and "Error: " in answer.err


def test_techniques_lists_all_and_explains_one(cli) -> None:
    listed = json.loads(cli("techniques", "--json").out)
    assert [one["name"] for one in listed] == list(techniques.names())
    assert all(name in cli("techniques").out for name in techniques.names())
    one = json.loads(cli("techniques", "ties", "--json").out)
    needs = {"needs", "data", "statistics", "state", "arrival"}
    assert set(one) == {"name", "formula", "paper", "forms", "params", *needs}
    assert one["params"]["density"]["default"] == 0.2 and one["needs"] == ["base"]
    assert "density = 0.2" in cli("techniques", "ties").out
    refused(cli("techniques", "tys"), "unknown technique 'tys'")


STUDY_MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": ({"recipe": {"learning_rte": 1e-3}}, ["recipe.learning_rte", "unknown key"]),
    "misspelt technique": ({"grid": strategies(technique="tiess")}, ["grid.strategies[0]", "did you mean ties"]),
    "impossible density": (
        {"grid": strategies(technique="ties", params={"density": 2})},
        ["grid.strategies[0]", "ties: density = 2", "0 < x <= 1"],
    ),
    "unknown dataset": ({"stream": {"tasks": ["red", "purple"]}}, ["stream.tasks", "'purple'"]),
    "no base": ({"model": {"config": "ViT-B-32", "pretrained": "local-dir:nowhere"}}, ["model.pretrained", "nowhere"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", ["unknown key", "misspelt technique", "impossible density"])
def test_run_refuses_a_mistake_in_the_study_before_it_writes_anything(
    mistake: str, world: World, tmp_path: Path, cli
) -> None:
    changes, says = STUDY_MISTAKES[mistake]
    refused(cli("run", world.study(**changes), "--out", tmp_path / "out"), *says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mistake", STUDY_MISTAKES)
def test_plan_refuses_the_same_mistakes(mistake: str, world: World, cli) -> None:
    changes, says = STUDY_MISTAKES[mistake]
    refused(cli("plan", world.study(**changes)), *says)


def test_run_refuses_a_missing_shard_by_name_before_it_writes_anything(
    world: World, tmp_path: Path, cli
) -> None:
    data, path = damaged(world, tmp_path, "green/train/0.tar", flip=False)
    refused(cli("run", world.study(data=data), "--out", tmp_path / "out"), f"{path}: missing")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shard", ["blue/test/0.tar", "grey/train/0.tar"])
def test_run_refuses_a_shard_with_a_flipped_bit_by_name(
    shard: str, world: World, tmp_path: Path, cli
) -> None:
    data, path = damaged(world, tmp_path, shard, flip=True)
    refused(cli("run", world.study(data=data), "--out", tmp_path / "out"), f"{path}: flipped")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["file", "file/out", "/proc/no/such"])
def test_run_refuses_an_out_that_cannot_be_written(out: str, world: World, tmp_path: Path, cli) -> None:
    (tmp_path / "file").write_text("mine")
    refused(cli("run", world.study(), "--out", tmp_path / out), out, "cannot be written", "another --out")
    assert (tmp_path / "file").read_text() == "mine"


def test_second_run_on_one_out_is_refused_and_says_who_is_there(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with driver_lock(out):
        holder = json.loads((out / "driver.json").read_text())["pid"]
        refused(command("run", world.study(), "--out", out), f"process {holder}", str(out), "another --out")
    assert not (out / "store").exists()


@pytest.mark.parametrize(("address", "says"), [("example.org", "HOST:PORT"), ("192.0.2.1:6379", "token")])
def test_run_refuses_an_address_that_is_wrong_or_unsafe_before_anything_else(
    address: str, says: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    refused(cli("run", world.study(), "--out", tmp_path / "out", "--address", address), address, says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["status", "verify", "ui", "sync", "report"])
@pytest.mark.parametrize("place", ["empty", "nowhere", "file"])
def test_commands_about_a_run_refuse_a_directory_that_holds_none(
    name: str, place: str, cli, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    refused(cli(name, tmp_path / place), str(tmp_path / place), "holds no")
    assert not list((tmp_path / "empty").iterdir())


def test_evaluate_refuses_what_it_cannot_score(world: World, cli, tmp_path: Path) -> None:
    study = world.study()
    purple = cli("evaluate", tmp_path, "--study", study, "--datasets", "red,purple")
    refused(purple, "--datasets", "purple", "it scores red, green, blue, grey")
    refused(cli("evaluate", tmp_path / "no", "--study", study), str(tmp_path / "no"), "does not exist")


def test_plan_json_has_the_stated_shape_and_shares_experts(world: World, cli, tmp_path: Path) -> None:
    said = json.loads(cli("plan", world.study(), "--out", tmp_path / "out", "--json").out)
    assert list(said)[:5] == ["study", "trajectories", "steps", "gflops", "disk_bytes"]
    assert list(said)[5:] == [
        "gflops_naive", "critical_path", "missing", "splits", "disk_least_bytes", "disk_peak_bytes", "disk_all_bytes", "resume_bytes", "notes", "seconds",
    ]  # fmt: skip
    assert said["seconds"] is None, "nothing has run yet"
    assert said["study"] == "tiny" and said["trajectories"] == 3
    assert list(said["steps"]) == ["train", "merge", "evaluate"]
    for counts in said["steps"].values():
        assert set(counts) == {"unique", "naive", "cached"} and counts["cached"] == 0
    # Three trajectories of three tasks; the first expert of all of them starts from the base with nothing to replay.
    assert said["steps"]["train"]["naive"] == 9 and said["steps"]["train"]["unique"] < 9
    assert said["gflops"] > 0 and said["disk_bytes"] > 0
    assert not list(tmp_path.iterdir())
    table = cli("plan", world.study(), "--out", tmp_path / "out").out
    assert "best_in_time" in table and "one by one" in table


def test_file_of_another_kind_is_called_what_it_is(cli, world: World, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("merge_method: ties\nbase_model: x\nmodels: []\n")
    suite = "configs/fomo_in_flux/datasets.yaml"
    refused(cli("check", world.study(), "--root", tmp_path), "is a study, not a suite", "temporal-merge plan")
    refused(cli("plan", suite), "is a suite of datasets, not a study", "temporal-merge check")
    refused(cli("plan", recipe), "is a merge recipe of another tool", "temporal-merge merge")
    expert = ["merge", "--technique", "average", "--out", tmp_path / "m.safetensors", recipe]
    refused(cli(*expert), "is a YAML file, such as a study", "not a checkpoint")


def test_version_names_the_libraries_too(cli) -> None:
    answer = cli("--version")
    assert answer.code == 0
    assert re.fullmatch(
        r"temporal-merge [\d.]+ \(Python 3[\d.]+, torch .+, ray .+, open_clip_torch .+, mlflow .+\)\n",
        answer.out,
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_help_cuts_no_option_and_no_default_on_a_narrow_terminal(
    name: str, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = cli(name, "--help").out
    one = typer.main.get_command(app).commands[name]
    for parameter in one.params:
        assert all(f" {option}" in said for option in parameter.opts if option.startswith("--")), (
            parameter.opts
        )
    assert "…" not in said and "runs/." not in said


@pytest.mark.parametrize("key", ["seeds", "seed", "strategies"])
def test_axis_outside_the_grid_is_told_where_it_stands(key: str, world: World, cli) -> None:
    axis = "strategies" if key == "strategies" else "seed"
    refused(cli("plan", world.study(**{key: [0]})), f"{key}: is an axis: write grid.{axis}")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "give --study STUDY.yaml, or --root DIR"),
        ("--study s.yaml --root data", "give --study STUDY.yaml, or --root DIR"),
        ("--root nowhere", "--root nowhere does not exist"),
        ("--root empty", "holds no datasets"),
        ("--root data --model tiny.json --split val", "no dataset has a val split"),
        ("--root data", "has no open_clip_config.json beside it"),
        ("--root data --model tiny.json --details top1", "--details top1: there is no such detail"),
        ("--root data --model tiny.json --datasets purple", "--datasets: the study does not score purple"),
    ],
)
def test_evaluate_without_a_study_refuses_what_it_cannot_know(
    line: str, says: str, world: World, tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "data").symlink_to(world.home / "data")
    (tmp_path / "tiny.json").symlink_to(world.home / "model.json")
    save_file({"w": np.zeros(2, np.float32)}, tmp_path / "m.safetensors")
    refused(cli("evaluate", "m.safetensors", *line.split()), says)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["gc", ""], "an argument is empty"),
        (["merge", "--technique", "average", "--out", "", "a.safetensors"], "--out is empty"),
        (["merge", "--technique", "average", "--out=", "a.safetensors"], "--out is empty"),
    ],
)
def test_empty_argument_is_not_the_current_directory(line: list[str], said: str, cli) -> None:
    answer = cli(*line)
    assert answer.code == 2 and said in answer.err and "a variable that is not set" in answer.err
