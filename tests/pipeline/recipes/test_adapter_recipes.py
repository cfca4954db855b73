"""Recipes of models with adapters on them: mergekit's `path+adapter`, ours, and the recipe that is written beside the result."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from merge_service.merge import merge
from pipeline.merging.files import Execution, FileMerge, merge_files
from pipeline.recipes.carry_out import Output, merge_recipe
from pipeline.recipes.of_files import with_texts
from pipeline.recipes.read import read_recipe
from tests.merge_service.adapters import peft_cases
from tests.merge_service.toys import load


@pytest.fixture
def room(tmp_path: Path) -> Path:
    base = tmp_path / "models" / "base"
    base.mkdir(parents=True)
    shutil.move(peft_cases.base(tmp_path), base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "tiny", "_name_or_path": "org/base"}))
    for case in ("plain", "rslora"):
        peft_cases.adapter(tmp_path / "models", case)
    return tmp_path


@pytest.mark.parametrize("spelling", ["text", "mapping"])
def test_mergekits_path_with_adapter_is_the_merge_of_the_adapters(room: Path, spelling: str) -> None:
    models = room / "models"
    named = [
        f"{models / 'base'}+{models / one}"
        if spelling == "text"
        else {"model": str(models / "base"), "lora": str(models / one)}
        for one in ("plain", "rslora")
    ]
    text = {"merge_method": "linear", "models": [{"model": one, "parameters": {"weight": 1}} for one in named],
            "dtype": "float32"}  # fmt: skip
    (room / "kit.yml").write_text(yaml.safe_dump(text))
    read = read_recipe(room / "kit.yml")
    report = merge_recipe(read.recipe, Output(room / "out"), Execution(threads=1))
    merge(
        "average",
        {},
        models / "base",
        [models / "plain", models / "rslora"],
        room / "m.safetensors",
        ids=["a", "b"],
    )
    found, want = load(report.out), load(room / "m.safetensors")
    assert all((found[name] == want[name]).all() for name in want)


def test_folder_of_a_merge_has_the_bases_files_and_a_recipe_that_makes_it_again(room: Path) -> None:
    models = room / "models"
    config = models / "plain" / "adapter_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(models / "base")})
    )
    what = FileMerge(
        "ties",
        {},
        models / "base",
        [models / "plain", Path(f"{models / 'base'}+{models / 'rslora'}")],
        room / "out",
    )
    merge_files(with_texts(what), Execution(threads=1))
    assert json.loads((room / "out" / "config.json").read_text())["model_type"] == "tiny"
    card = (room / "out" / "README.md").read_text()
    assert "org/base+rslora" in card and "library_name: transformers" in card and str(room) not in card
    merge_recipe(
        read_recipe(room / "out" / "merge.yaml").recipe, Output(room / "again"), Execution(threads=1)
    )
    assert (
        load(room / "again" / "model.safetensors").keys() == load(room / "out" / "model.safetensors").keys()
    )
    first, second = (load(room / one / "model.safetensors") for one in ("out", "again"))
    assert all((first[name] == second[name]).all() for name in first)


def test_inputs_of_an_adapter_are_not_overwritten(room: Path) -> None:
    models = room / "models"
    for out in (models / "base", models / "base" / "model.safetensors", models / "plain"):
        with pytest.raises(ValueError, match="input"):
            merge_files(
                FileMerge("average", {}, None, [Path(f"{models / 'base'}+{models / 'plain'}")], out),
                Execution(threads=1),
            )
