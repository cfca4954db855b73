"""One command makes a base from its recipe, and the rule of the recipe ends its training."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import yaml

from merge_service.checkpoints import WEIGHTS_FILE, Checkpoint
from merge_service.errors import UserError
from tests.workers.data_helpers import coloured
from workers.data.mini import ROLES as ROLES_OF_MINI
from workers.data.writer import Sample, write_dataset
from workers.data.zero_shot import derived
from workers.pretrain.__main__ import main
from workers.pretrain.base import count_weights, pretrain, write_pool
from workers.pretrain.page import page
from workers.pretrain.recipe import best, ended, read_settings
from workers.scoring import evaluate as scoring

MODELS = Path(__file__).parents[3] / "configs" / "models"
SHIPPED = ("tiny-clip-s", "tiny-clip", "tiny-clip-l")
ROLES = {"pretraining": ["taught", "named"], "adaptation": ["task"], "held_out": ["taught", "named", "kept"]}


def write(root: Path, name: str, test: int = 0, splits: tuple[str, ...] = ("train", "val", "test")) -> None:
    """Three colours; `test` shifts the pictures of the test split."""
    first = {"train": 0, "val": 100, "test": 200 + test}
    write_dataset(
        root / name, kind="classification", classes=[f"{name} {number}" for number in range(3)], templates=["a {c}"],
        splits={split: coloured(12, 3, first[split]) for split in splits},
    )  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A recipe beside a minute configuration, and a suite of four datasets."""
    data = tmp_path / "data"
    for name in ("taught", "kept", "task"):
        write(data, name)
    pictures = [
        Sample(np.full((8, 8, 3), 20 * number, np.uint8), captions=(f"grey {number}",)) for number in range(8)
    ]
    splits = {"train": pictures, "val": pictures[:6], "test": pictures}
    write_dataset(data / "named", kind="retrieval", classes=[], templates=[], splits=splits)
    (data / "suite.json").write_text(json.dumps({"name": "tiny", "image_size": 8, "roles": ROLES}))
    vision = {"image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8}
    text = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
    body = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(body))
    recipe = {
        "root": str(data), "pool": {"taught": {"copies": 2, "changes": ["shift"]}, "named": {"copies": 1}},
        "base_only": {"kept": {"copies": 1}}, "recipe": {"batch_size": 8, "precision": "fp32", "lr": 1e-3},
        "stop": {"every": 2, "patience": 9, "steps": 5}, "seed": 3, "storage": "fp16",
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return tmp_path


def change(place: Path, **keys: Any) -> None:
    recipe = yaml.safe_load((place / "recipe.yaml").read_text())
    (place / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **keys}, sort_keys=False))


def weights(directory: Path) -> bytes:
    return (directory / WEIGHTS_FILE).read_bytes()


def scripted(monkeypatch: pytest.MonkeyPatch, means: list[float]) -> list[set[tuple[str, str]]]:
    """Make checks return these scores, one after the other; returns the requested (dataset, split) pairs."""
    asked: list[set[tuple[str, str]]] = []

    def score(job: Any) -> Mapping[str, Any]:
        asked.append({(source.dataset, source.split) for source in job.datasets})
        mean = means[min(len(asked), len(means)) - 1]
        names = [source.dataset for source in job.datasets]
        return {"scores": dict.fromkeys(names, mean), "samples": dict.fromkeys(names, 1)}

    monkeypatch.setattr(scoring, "evaluate", score)
    return asked


def test_recipe_gives_a_weights_directory_that_open_clip_opens(place: Path) -> None:
    result = pretrain(place / "recipe.yaml", place / "out")
    assert sorted(path.name for path in (place / "out").iterdir()) == [
        "README.md", "open_clip_config.json", "open_clip_model.safetensors", "scores.json",
    ]  # fmt: skip
    open_clip.create_model_and_transforms(f"local-dir:{place / 'out'}")
    with Checkpoint.open(place / "out") as checkpoint:
        assert {info.dtype for info in checkpoint.tensors.values()} == {"F16"}
    assert set(result["scores"]) == {"taught", "named", "kept", "task"} and result["chance"]["named"] == 5 / 8
    text = (place / "out" / "README.md").read_text()
    scores = f"{result['scores']['kept']:.3f} | {result['val_scores']['kept']:.3f}"
    assert f"| never replayed | kept | 12 | {scores} | 0.333 |" in text
    assert "experts may replay: taught x2, named x1\n" in text and "for the base alone: kept x1\n" in text
    assert result["weights"]["token_table"] == 49408 * 8
    assert f"{result['weights']['all']:,} weights, of which\n{49408 * 8:,} are the table of tokens" in text


def test_same_recipe_gives_the_same_bytes_and_another_seed_others(place: Path) -> None:
    for name, seed in (("one", None), ("two", 3), ("three", 4)):
        result = pretrain(place / "recipe.yaml", place / name, seed=seed)
        assert result["seed"] == (seed or 3)
    assert weights(place / "one") == weights(place / "two") != weights(place / "three")


def test_all_that_is_taught_are_training_splits_of_the_pool_and_of_base_only(place: Path) -> None:
    settings = read_settings(place / "recipe.yaml")
    sources = write_pool(settings, place / "pool", place / "cache")
    assert [(source.dataset, source.split) for source in sources] == [
        ("taught", "train"), ("named", "train"), ("kept", "train"),
    ]  # fmt: skip
    pretrain(place / "recipe.yaml", place / "out")
    change(place, base_only={})
    pretrain(place / "recipe.yaml", place / "without")
    assert weights(place / "out") != weights(place / "without")


def test_training_ends_by_the_rule_and_the_best_check_is_kept(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(place, stop={"every": 1, "rise": 0.1, "patience": 2, "steps": 9})
    scripted(monkeypatch, [0.2, 0.5, 0.55, 0.4])
    result = pretrain(place / "recipe.yaml", place / "out")
    assert result["checks"] == [(1, 0.2), (2, 0.5), (3, 0.55), (4, 0.4)]
    assert result["kept"] == 3 and result["train"]["steps"] == 4 and result["train"]["samples"] == 32
    scripted(monkeypatch, [0.1, 0.1, 0.9, 0.1])
    change(place, stop={"every": 1, "rise": 0.1, "patience": 3, "steps": 9})
    other = pretrain(place / "recipe.yaml", place / "other")
    assert other["kept"] == 3 and weights(place / "out") == weights(place / "other")


def test_checks_read_validation_splits_of_held_out_sets_alone(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = scripted(monkeypatch, [0.5])
    pretrain(place / "recipe.yaml", place / "out")
    *checks, test, val = asked
    assert len(checks) == 3
    assert all(check == val == {(name, "val") for name in ROLES["held_out"]} for check in checks)
    assert test == {(name, "test") for name in ("taught", "named", "kept", "task")}


def test_test_splits_have_no_say_in_the_weights(place: Path) -> None:
    pretrain(place / "recipe.yaml", place / "out")
    for name in ("taught", "kept", "task"):
        shutil.rmtree(place / "data" / name)
        write(place / "data", name, test=30)
    pretrain(place / "recipe.yaml", place / "other")
    assert weights(place / "out") == weights(place / "other")


@pytest.mark.parametrize("stopped_in", [1, 2, 3])
def test_run_that_was_stopped_in_a_check_ends_with_the_same_weights(
    place: Path, monkeypatch: pytest.MonkeyPatch, stopped_in: int
) -> None:
    whole = pretrain(place / "recipe.yaml", place / "whole")
    true, calls = scoring.evaluate, 0

    def stop(job: Any) -> Mapping[str, Any]:
        nonlocal calls
        calls += 1
        if calls == stopped_in:
            raise KeyboardInterrupt
        return true(job)

    monkeypatch.setattr(scoring, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain(place / "recipe.yaml", place / "out")
    resumed = pretrain(place / "recipe.yaml", place / "out")
    assert [resumed[key] for key in ("checks", "kept", "scores")] == [
        whole[key] for key in ("checks", "kept", "scores")
    ]
    assert weights(place / "out") == weights(place / "whole")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pool": {"task": {"copies": 1}}}, "pool names task, which are not in the pretraining role"),
        ({"base_only": {"task": {"copies": 1}}}, "base_only names task; it may name held-out sets that experts never replay: kept"),
        ({"base_only": {"named": {"copies": 1}}}, "base_only names named; it may name held-out sets"),
        ({"stopp": {}}, "stopp: Extra inputs are not permitted"),
        ({"stop": {"rise": -1}}, "stop.rise: Input should be greater than 0"),
    ],
)  # fmt: skip
def test_recipe_that_may_not_be_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], keys: dict[str, Any], message: str
) -> None:
    change(place, **keys)
    assert main([str(place / "recipe.yaml"), "--out", str(place / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (place / "out").exists()


def test_held_out_set_without_validation_split_is_refused_before_training(place: Path) -> None:
    write(place / "data", "bare", splits=("test",))
    suite = json.loads((place / "data" / "suite.json").read_text())
    suite["roles"]["held_out"].append("bare")
    (place / "data" / "suite.json").write_text(json.dumps(suite))
    with pytest.raises(UserError, match="'bare' has no split 'val'"):
        pretrain(place / "recipe.yaml", place / "out")
    assert not (place / "out").exists()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_base_is_small_and_counts_its_weights(name: str) -> None:
    assert (MODELS / name / WEIGHTS_FILE).stat().st_size <= 10_000_000
    stated = json.loads((MODELS / name / "scores.json").read_text())
    assert stated["weights"] == count_weights(MODELS / name)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_base_ended_by_its_rule(name: str) -> None:
    settings = read_settings(MODELS / name / "recipe.yaml")
    stated = json.loads((MODELS / name / "scores.json").read_text())
    steps, scores = zip(*stated["checks"], strict=True)
    assert steps == tuple(range(settings.stop.every, steps[-1] + 1, settings.stop.every))
    assert ended(scores, settings.stop) or steps[-1] == settings.stop.steps
    assert not any(ended(scores[:count], settings.stop) for count in range(len(scores)))
    assert stated["kept"] == steps[best(scores)] and stated["train"]["steps"] == steps[-1]
    held_out = [stated["val_scores"][name] for name in stated["roles"]["held_out"]]
    assert sum(held_out) / len(held_out) == pytest.approx(max(scores), abs=1e-4)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_base_stands_well_above_chance_on_every_held_out_set(name: str) -> None:
    stated = json.loads((MODELS / name / "scores.json").read_text())
    assert stated["roles"] == ROLES_OF_MINI
    text = (MODELS / name / "README.md").read_text()
    for dataset in stated["roles"]["held_out"]:
        assert stated["scores"][dataset] >= 3 * stated["chance"][dataset], dataset
        assert f"| {dataset} | {stated['samples'][dataset]} | {stated['scores'][dataset]:.3f} |" in text


@pytest.mark.parametrize("name", SHIPPED)
def test_pages_about_a_shipped_base_state_its_numbers(name: str) -> None:
    recipe = MODELS / name / "recipe.yaml"
    stated = json.loads((MODELS / name / "scores.json").read_text())
    place = recipe.relative_to(MODELS.parents[1])
    assert (MODELS / name / "README.md").read_text() == page(place, read_settings(recipe), stated)
    groups = derived(stated["roles"]["held_out"], stated["roles"]["pretraining"])
    means = [sum(stated["scores"][name] for name in names) / len(names) for names in groups.values()]
    weights, table = (f"{stated['weights'][key]:,}" for key in ("all", "token_table"))
    row = f"| `{name}` | {weights} | {table} | {stated['kept']:,} | {means[0]:.3f} | {means[1]:.3f} | {stated['minutes']} |"
    assert row in (MODELS.parents[1] / "docs" / "data.md").read_text()
