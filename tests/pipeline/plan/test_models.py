"""Models in a plan: names and tags are checked, preprocessing is identified where it matters, files are equal to directories."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from merge_service.errors import UserError
from merge_service.merge import merge
from pipeline.plan.facts import base_identity, gather
from pipeline.run.evaluation import score
from pipeline.study.config import load_study
from pipeline.study.sections import ModelSection
from pipeline.workspace.workspace import Workspace
from tests.world import MODEL, World, make_world
from workers.models.base import MAX_LOGIT_SCALE
from workers.models.model import export_base, load, save


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    home = tmp_path_factory.mktemp("models")
    made = make_world(home)
    export_base(str(home / "model.json"), None, home / "base", seed=1)
    return made


def planned(world: World, model: dict[str, Any], overrides: Sequence[str] = (), **changes: Any) -> Workspace:
    file = world.study(model=model, grid={"strategies": ["continual_finetuning"]}, **changes)
    return Workspace.of(load_study(file, overrides), world.home / "out", provisional=True)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"config": "ViT-B-33"}, "did you mean ViT-B-32"),
        ({"config": "ViT-B-32", "pretrained": "laion2b"}, "did you mean laion2b_"),
        ({"config": "ViT-B-32", "pretrained": "mine.safetensors"}, "mine.safetensors does not exist"),
        ({"config": "ViT-B-32", "pretrained": "{home}/base"}, "different networks"),
        ({"config": "{home}/typo.json"}, "layerz: unknown key; did you mean layers?"),
        (
            {"config": "{home}/base/open_clip_config.json", "pretrained": "{home}/other.safetensors"},
            "proj is missing",
        ),
        ({"config": "{home}/base", "pretrained": "{home}/x.safetensors.index.json"}, "give the directory"),
        ({"config": "ViT-B-32", "preprocess": {"means": [0, 0, 0]}}, "model.preprocess.mean"),
        ({"config": "ViT-B-32", "preprocess": {"std": [0, 0, 0]}}, "model.preprocess.std"),
        ({"config": "ViT-B-32", "preprocess": {"resize_mode": "crop"}}, "shortest, longest, squash"),
    ],
)
def test_model_that_a_run_would_refuse_is_refused_by_the_plan(
    world: World, model: dict[str, Any], says: str
) -> None:
    typo = json.loads(json.dumps(MODEL))
    typo["model_cfg"]["text_cfg"]["layerz"] = 2
    (world.home / "typo.json").write_text(json.dumps(typo))
    tensors = load_file(world.home / "base" / WEIGHTS_FILE)
    del tensors["visual.proj"]
    save_file(tensors, world.home / "other.safetensors")
    (world.home / "x.safetensors.index.json").write_text("{}")
    named = {k: v.format(home=world.home) if isinstance(v, str) else v for k, v in model.items()}
    with pytest.raises(UserError) as caught:
        planned(world, named)
    assert says in str(caught.value)


def test_preprocessing_counts_in_the_identity_only_where_it_changes_something(world: World) -> None:
    model = {"config": str(world.home / "model.json"), "pretrained": str(world.home / "base")}
    plain = planned(world, model).plan
    same = planned(world, model | {"preprocess": {"mean": [0.5, 0.5, 0.5]}}).plan
    other = planned(world, model | {"preprocess": {"mean": [0.4, 0.5, 0.5]}}).plan
    assert plain.fingerprint == same.fingerprint != other.fingerprint
    assert not set(plain.steps) & set(other.steps)
    file = planned(world, model | {"pretrained": str(world.home / "base" / WEIGHTS_FILE)}).plan
    assert file.fingerprint == plain.fingerprint, "a file and its directory are one base"
    swept = planned(world, model, ["grid.model.preprocess.mean=[[0.4,0.5,0.5],[0.5,0.5,0.5]]"]).plan
    assert set(swept.bases) == set(plain.bases) | set(other.bases)


def test_configuration_file_counts_by_its_content(world: World, tmp_path: Path) -> None:
    file = tmp_path / "model.json"
    file.write_text(json.dumps(MODEL))
    one = planned(world, {"config": str(file)}).plan.fingerprint
    moved = shutil.copyfile(file, tmp_path / "moved.json")
    assert planned(world, {"config": str(moved)}).plan.fingerprint == one
    file.write_text(json.dumps({**MODEL, "model_cfg": MODEL["model_cfg"] | {"quick_gelu": True}}))
    assert planned(world, {"config": str(file)}).plan.fingerprint != one


def test_objective_counts_where_it_is_not_that_of_a_clip(world: World, tmp_path: Path) -> None:
    file = tmp_path / "model.json"
    file.write_text(json.dumps({**MODEL, "model_cfg": MODEL["model_cfg"] | {"init_logit_bias": -10}}))
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "head_width": 32}
    (tmp_path / "rn.json").write_text(json.dumps({"model_cfg": MODEL["model_cfg"] | {"vision_cfg": resnet}}))

    def said(config: Path, workers: int) -> dict[str, Any]:
        plan = planned(world, {"config": str(config)}, [f"resources.experts.workers={workers}"]).plan
        spec = next(step.spec for step in plan.steps.values() if step.kind == "train")
        return {key: spec[key] for key in ("objective", "batch_norm") if key in spec}

    assert said(world.home / "model.json", 2) == {} == said(tmp_path / "rn.json", 1)
    assert said(file, 1) == {"objective": "sigmoid"}
    assert said(tmp_path / "rn.json", 2) == {"batch_norm": "synchronised"}


def test_temperature_that_no_loss_knows_is_refused_where_it_would_be_trained(
    world: World, tmp_path: Path
) -> None:
    model = load(world.home / "base")
    model.logit_scale.data.fill_(MAX_LOGIT_SCALE + 1)
    tmp_path.joinpath("hot").mkdir()
    save(model, world.home / "base", tmp_path / "hot")
    with pytest.raises(UserError, match="no logit_bias"):
        planned(world, {"config": str(tmp_path / "hot")})
    study = load_study(
        world.study(model={"config": str(tmp_path / "hot")}, grid={"strategies": ["zero_shot"]})
    )
    assert gather(study.resolved())


def test_file_beside_its_configuration_scores_as_its_directory(world: World, tmp_path: Path) -> None:
    model = {"config": str(world.home / "model.json"), "pretrained": str(world.home / "base")}
    study = load_study(world.study(model=model))
    home = shutil.copytree(world.home / "base", tmp_path / "mine")
    found = json.loads((home / CONFIG_FILE).read_text())
    found["preprocess_cfg"] |= {"mean": [0, 0, 0], "std": [0.1, 1, 1]}
    (home / CONFIG_FILE).write_text(json.dumps(found))
    directory, file = (score(place, study, ["red"]) for place in (home, home / WEIGHTS_FILE))
    assert directory["scores"] == file["scores"] and directory["preprocess"] == file["preprocess"]
    assert (
        file["preprocess"]["mean"] == [0, 0, 0] and "while the study's base has mean 0.5" in file["notes"][0]
    )
    lent = shutil.copyfile(home / WEIGHTS_FILE, tmp_path / "alone.safetensors")
    assert score(lent, study, ["red"])["preprocess"]["mean"] == [0.5, 0.5, 0.5]
    stated = load_study(world.study(model=model | {"preprocess": {"mean": [0, 0, 0], "std": [0.1, 1, 1]}}))
    assert score(lent, stated, ["red"])["scores"] == file["scores"]
    assert (home / CONFIG_FILE).read_text() == json.dumps(found), (
        "evaluating writes nothing into a model's folder"
    )


def test_checkpoint_in_shards_or_with_a_wrappers_names_scores_as_in_one_file(
    world: World, tmp_path: Path
) -> None:
    study = load_study(world.study(model={"config": str(world.home / "base")}))
    shards, wrapped = tmp_path / "shards", tmp_path / "wrapped.safetensors"
    shards.mkdir()
    merge("average", {}, None, [world.home / "base"], shards / "model.safetensors", shard_bytes=10**6)
    assert len(list(shards.glob("*.safetensors"))) > 1
    tensors = load_file(world.home / "base" / WEIGHTS_FILE)
    save_file({f"module.{name}": tensor for name, tensor in tensors.items()}, wrapped)
    named = shutil.copytree(shards, tmp_path / "named")
    shutil.copyfile(world.home / "base" / CONFIG_FILE, named / CONFIG_FILE)
    expected = score(world.home / "base", study, ["red"])["scores"]
    for place in (shards, shards / "model.safetensors.index.json", wrapped, named):
        assert score(place, study, ["red"])["scores"] == expected


def test_base_in_shards_is_known_by_the_content_of_all_of_them(world: World, tmp_path: Path) -> None:
    seen = []
    for number in (0, 1):
        home = tmp_path / str(number)
        home.mkdir()
        shutil.copyfile(world.home / "base" / CONFIG_FILE, home / CONFIG_FILE)
        with torch.random.fork_rng():
            torch.manual_seed(number)
            tensors = {f"t{at}": torch.randn(8, 8) for at in range(4)}
        save_file(tensors, tmp_path / "plain.safetensors")
        merge("average", {}, None, [tmp_path / "plain.safetensors"], home / "m.safetensors", shard_bytes=600)
        section = ModelSection.model_validate({"config": str(home)})
        seen.append((base_identity(section, None)[0], (home / "m.safetensors.index.json").read_bytes()))
    assert seen[0][1] == seen[1][1] and seen[0][0] != seen[1][0]


def test_checkpoint_that_is_refused_is_named_as_it_was_given(world: World, tmp_path: Path) -> None:
    study = load_study(world.study(model={"config": str(world.home / "base")}))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((world.home / "base" / WEIGHTS_FILE).read_bytes()[:-100])
    less = tmp_path / "less.safetensors"
    tensors = load_file(world.home / "base" / WEIGHTS_FILE)
    save_file({name: tensor for name, tensor in tensors.items() if name != "logit_scale"}, less)
    for file in (cut, less):
        with pytest.raises(UserError) as caught:
            score(file, study, ["red"])
        assert str(caught.value).startswith(f"{file} ")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recipe": {"accumulate": 2}}, "normalises over the batch"),
        ({"recipe": {"patch_dropout": 0.5}}, "recipe.patch_dropout is for"),
        ({"resources": {"experts": {"activation_checkpointing": True}}}, "has a ModifiedResNet"),
    ],
)
def test_recipe_that_the_network_cannot_follow_is_refused_by_the_plan(
    world: World, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "head_width": 32}
    (tmp_path / "rn.json").write_text(json.dumps({"model_cfg": MODEL["model_cfg"] | {"vision_cfg": resnet}}))
    overrides = [
        f"{section}.{key}={json.dumps(value)}"
        for section, keys in changes.items()
        for key, value in keys.items()
    ]
    assert planned(world, {"config": str(world.home / "model.json")}, overrides).plan.steps
    with pytest.raises(UserError, match=says) as caught:
        planned(world, {"config": str(tmp_path / "rn.json")}, overrides)
    assert f"model.config {tmp_path / 'rn.json'}" in str(caught.value)
    frozen = [*overrides, "recipe.trainable=text"]
    if "accumulate" in str(changes):
        assert planned(world, {"config": str(tmp_path / "rn.json")}, frozen).plan.steps
