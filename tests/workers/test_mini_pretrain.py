"""The base comes out of its recipe by one command, from the pretraining role alone."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import yaml

from merge_service.checkpoints import Checkpoint
from merge_service.errors import UserError
from tests.workers.data_helpers import write_coloured
from workers import pretrain as command
from workers.data.writer import Sample, write_dataset
from workers.pretrain import pretrain, read_settings

SHIPPED = Path(__file__).parents[2] / "configs" / "models" / "tiny-clip"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A recipe beside a minute configuration, and a suite of three datasets."""
    for name in ("taught", "task"):
        write_coloured(tmp_path / "data", name, 12)
    pictures = [
        Sample(np.full((8, 8, 3), 20 * number, np.uint8), captions=(f"grey {number}",)) for number in range(8)
    ]
    write_dataset(
        tmp_path / "data" / "named",
        kind="retrieval",
        classes=[],
        templates=[],
        splits={"train": pictures, "test": pictures},
    )
    roles = {"pretraining": ["taught", "named"], "adaptation": ["task"], "held_out": ["taught", "named"]}
    (tmp_path / "data" / "suite.json").write_text(
        json.dumps({"name": "tiny", "image_size": 8, "roles": roles})
    )
    vision = {"image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8}
    text = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
    body = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(body))
    recipe = {
        "root": str(tmp_path / "data"), "pool": {"taught": {"copies": 2, "changes": ["shift"]}, "named": {"copies": 1}},
        "recipe": {"batch_size": 8, "precision": "fp32", "lr": 1e-3}, "steps": 3, "storage": "fp16",
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def test_recipe_gives_a_weights_directory_that_open_clip_opens(place: Path) -> None:
    result = pretrain(place / "recipe.yaml", place / "out")
    assert sorted(path.name for path in (place / "out").iterdir()) == [
        "README.md", "open_clip_config.json", "open_clip_model.safetensors", "scores.json",
    ]  # fmt: skip
    open_clip.create_model_and_transforms(f"local-dir:{place / 'out'}")
    with Checkpoint.open(place / "out") as weights:
        assert {info.dtype for info in weights.tensors.values()} == {"F16"}
    assert set(result["scores"]) == {"taught", "named", "task"} and result["chance"]["named"] == 5 / 8
    page = (place / "out" / "README.md").read_text()
    assert f"| held-out | taught | 6 | {result['scores']['taught']:.3f} | 0.333 |" in page


def test_same_recipe_gives_the_same_bytes(place: Path) -> None:
    for name in ("one", "two"):
        pretrain(place / "recipe.yaml", place / name)
    files = [(place / name / "open_clip_model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_pool_outside_the_pretraining_role_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = yaml.safe_load((place / "recipe.yaml").read_text())
    recipe["pool"]["task"] = {"copies": 1}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert command.main([str(place / "recipe.yaml"), "--out", str(place / "out")]) == 2
    assert "pool names task, which are not in the pretraining role" in capsys.readouterr().err


def test_unknown_key_of_the_recipe_is_named(place: Path) -> None:
    (place / "recipe.yaml").write_text((place / "recipe.yaml").read_text() + "stepz: 4\n")
    with pytest.raises(UserError, match="stepz: Extra inputs are not permitted"):
        read_settings(place / "recipe.yaml")


def test_shipped_base_is_small_and_its_recipe_reads() -> None:
    assert read_settings(SHIPPED / "recipe.yaml").storage == "fp16"
    assert (SHIPPED / "open_clip_model.safetensors").stat().st_size <= 10_000_000


def test_shipped_base_stands_well_above_chance_on_every_held_out_set() -> None:
    stated = json.loads((SHIPPED / "scores.json").read_text())
    for name in stated["roles"]["held_out"]:
        assert stated["scores"][name] >= 3 * stated["chance"][name], name
    assert "| held-out | **mean** |" in (SHIPPED / "README.md").read_text()
