"""Recipes, folders and pickles on the command line."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.numpy import load_file

from tests.pipeline.recipes.tiny import write_models

MERGEKIT = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: [0, 1]}\ndtype: bfloat16\n"


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_merge_of_folders_writes_a_recipe_that_makes_the_same_bytes_again(cli, room: Path) -> None:
    first = cli(
        "merge", "--technique", "average", "--base", "base", "--set", "weights=[0.25, 0.75]", "--dtype", "float16", "--out", "out", "a", "b"
    )  # fmt: skip
    assert first.code == 0, first.err
    again = cli("merge", "out/merge.yaml", "--out", "again")
    assert again.code == 0, again.err
    assert (room / "out/model.safetensors").read_bytes() == (room / "again/model.safetensors").read_bytes()
    assert json.loads((room / "out/config.json").read_text())["torch_dtype"] == "float16"


@pytest.mark.parametrize(
    "given",
    [
        ("ties", "density=[0.2, 0.9]"),
        ("ties", "weights=[0.5, 1]"),
        ("task_arithmetic", "coefficients={'*mlp*': [1, 0.5], '*': [0.25, 0.75]}"),
    ],
)
def test_value_of_each_expert_is_in_the_recipe_beside_a_folder(
    given: tuple[str, str], cli, room: Path
) -> None:
    technique, setting = given
    first = cli(
        "merge", "--technique", technique, "--base", "base", "--set", setting, "--out", "out", "a", "b"
    )
    assert first.code == 0, first.err
    assert cli("merge", "out/merge.yaml", "--out", "again").code == 0
    assert (room / "out/model.safetensors").read_bytes() == (room / "again/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "given, said",
    [
        (("averge",), "did you mean average"),
        (("average", "--set", "weights=2"), "weights = 2 is not a list"),
        (("average", "--set", "wieghts=[1, 2]"), "did you mean weights"),
        (("ties", "--base", "base", "--set", "coefficients=1"), "coefficients = 1 is not"),
    ],
)
def test_mistake_in_a_merge_into_a_folder_ends_with_code_2(
    given: tuple[str, ...], said: str, cli, room: Path
) -> None:
    answer = cli("merge", "--technique", *given, "--out", "out", "a", "b")
    assert answer.code == 2 and answer.err.startswith("error: ") and said in answer.err
    assert not (room / "out").exists()


def test_recipe_of_mergekit_is_merged_as_it_is(cli, room: Path) -> None:
    (room / "r.yml").write_text(MERGEKIT)
    answer = cli("merge", "r.yml", "--dtype", "float32", "--out", "out", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["technique"] == "slerp" and json.loads(answer.out)["experts"] == 2
    assert (
        "sums are float32" in answer.err
        and load_file(room / "out/model.safetensors")["lm_head.weight"].dtype.name == "float32"
    )


def test_recipe_command_prints_it_in_our_terms(cli, room: Path) -> None:
    (room / "r.yml").write_text(MERGEKIT)
    answer = cli("recipe", "--from", "mergekit", "r.yml")
    assert answer.code == 0 and yaml.safe_load(answer.out) == {
        "technique": "slerp", "experts": ["a", "b"], "parameters": {"weight": [0, 1]}, "dtype": "bfloat16",
    }  # fmt: skip
    assert json.loads(cli("recipe", "r.yml", "--json").out)["merges"][0]["technique"] == "slerp"
    assert cli("recipe", "--from", "fusion", "r.yml").code == 2


@pytest.mark.parametrize(
    "options, said",
    [
        (("--set", "density=1"), "--set cannot be given beside a recipe"),
        (("--base", "base"), "--base cannot be given beside a recipe"),
        (("--workers", "2"), "leave --workers out"),
    ],
)
def test_option_that_belongs_into_the_recipe_is_refused(
    cli, room: Path, options: tuple[str, ...], said: str
) -> None:
    (room / "r.yml").write_text(MERGEKIT)
    answer = cli("merge", "r.yml", *options, "--out", "out")
    assert answer.code == 2 and said in answer.err and not (room / "out").exists()


def test_output_of_a_recipe_is_replaced_only_with_force(cli, room: Path) -> None:
    (room / "r.yml").write_text(MERGEKIT)
    assert cli("merge", "r.yml", "--out", "out").code == 0
    assert cli("merge", "r.yml", "--out", "out").code == 2
    assert cli("merge", "r.yml", "--out", "out", "--force").code == 0


def test_pickle_is_converted_and_an_existing_file_kept(cli, room: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(2, 2)}}, room / "m.ckpt")
    answer = cli("convert", "m.ckpt", "m.safetensors", "--json")
    assert (
        answer.code == 0
        and json.loads(answer.out)["tensors"] == 1
        and "taken from m.ckpt: state_dict" in answer.err
    )
    assert cli("convert", "m.ckpt", "m.safetensors").code == 2
    assert cli("convert", "m.ckpt", "m.safetensors", "--force").code == 0
    assert load_file(room / "m.safetensors")["w"].tolist() == [[1, 1], [1, 1]]


def test_file_that_is_safetensors_already_is_not_converted(cli, room: Path) -> None:
    for source in ("a/model.safetensors", "a"):
        answer = cli("convert", source, "new.safetensors")
        assert answer.code == 2 and "safetensors already" in answer.err


def test_merge_into_shards_that_was_stopped_goes_on_without_force_and_a_finished_one_does_not(
    cli, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (
        "merge",
        "--technique",
        "ties",
        "--base",
        "base",
        "--shard-size",
        "1KB",
        "--dtype",
        "bfloat16",
        "a",
        "b",
        "--out",
    )
    assert cli(*given, "whole").code == 0

    def full(name: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("merge_service.checkpoints.folders.staged.point", full)
        assert cli(*given, "out").code == 1
    assert list((room / "out").glob(".model.*.parts/*.json"))
    again = cli(*given, "out")
    assert again.code == 0, again.err
    for file in (room / "whole").glob("model*"):
        assert (room / "out" / file.name).read_bytes() == file.read_bytes()
    assert cli(*given, "out").code == 2
