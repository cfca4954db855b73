"""Configurations of models are read by allow-list: only open_clip's keys, and every mistake is named."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
from open_clip.coca_model import MultimodalCfg as TheirMultimodal
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.transform import PreprocessCfg as TheirPreprocess

from merge_service.errors import UserError
from tests.workers.model_helpers import MODEL_CFG
from workers.models import configuration
from workers.models.configuration import OPENAI, checked, open_clip_models, read_configuration


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (configuration.VisionCfg, CLIPVisionCfg),
        (configuration.TextCfg, CLIPTextCfg),
        (configuration.MultimodalCfg, TheirMultimodal),
        (configuration.PreprocessCfg, TheirPreprocess),
    ],
)
def test_allow_list_has_the_keys_of_open_clip(ours: Any, theirs: Any) -> None:
    assert set(ours.model_fields) == {field.name for field in dataclasses.fields(theirs)}


def test_default_preprocessing_is_open_clips() -> None:
    assert dataclasses.asdict(TheirPreprocess()) == OPENAI


def test_every_configuration_that_open_clip_brings_is_read() -> None:
    assert set(open_clip_models()) == set(open_clip.list_models())
    for name, file in open_clip_models().items():
        found = read_configuration(file)
        assert found["model_cfg"] == json.loads(file.read_text()), name


def changed(path: str, value: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {"model_cfg": copy.deepcopy(MODEL_CFG), "preprocess_cfg": {}}
    place = raw
    *parts, last = path.split(".")
    for part in parts:
        place = place.setdefault(part, {})
    if value is None:
        del place[last]
    else:
        place[last] = value
    return raw


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("model_cfg.text_cfg.layerz", 2, "model_cfg.text_cfg.layerz: unknown key; did you mean layers?"),
        ("model_cfg.vision_cfg.patchsize", 8, "did you mean patch_size?"),
        ("model_cfg.embed_dims", 8, "model_cfg.embed_dims: unknown key; did you mean embed_dim?"),
        ("preprocess_cfg.means", [0, 0, 0], "preprocess_cfg.means: unknown key; did you mean mean?"),
        ("preproces_cfg", {}, "preproces_cfg: unknown key; did you mean preprocess_cfg?"),
        ("model_cfg.text_cfg.tokenizer_kwargs.trust_remote_code", True, "nothing that comes with a model is executed"),
        ("model_cfg.text_cfg.tokenizer_kwargs.bpe_path", "/etc/passwd", "tokenizer_kwargs.bpe_path: unknown key"),
        ("model_cfg.text_cfg.width", "32", 'model_cfg.text_cfg.width: "32": input should be a valid integer'),
        ("model_cfg.vision_cfg.layers", "two", "model_cfg.vision_cfg.layers"),
        ("model_cfg.vision_cfg.image_size", [32], "model_cfg.vision_cfg.image_size"),
        ("model_cfg.embed_dim", 0, "model_cfg.embed_dim: 0: input should be greater than or equal to 1"),
        ("model_cfg.embed_dim", None, "has no embed_dim"),
        ("model_cfg.text_cfg.heads", 7, "width 32 cannot be shared by heads 7"),
        ("model_cfg.vision_cfg.head_width", 10, "width 32 cannot be shared by heads of head_width 10"),
        ("model_cfg.vision_cfg.patch_size", 64, "patch_size 64 does not fit image_size 32"),
        ("model_cfg.text_cfg.vocab_size", 1000, "vocab_size 1000 is less than the 49408"),
        ("model_cfg.vision_cfg.timm_model_name", "hf-hub:evil/model", "timm_model_name"),
        ("model_cfg.vision_cfg.pool_type", "best", "model_cfg.vision_cfg.pool_type"),
        ("model_cfg.quick_gelu", "yes", "model_cfg.quick_gelu"),
        ("preprocess_cfg.mean", [0.5, 0.5], "preprocess_cfg.mean"),
        ("preprocess_cfg.std", [0.5, 0, 0.5], "preprocess_cfg.std.1: 0: input should be greater than 0"),
        ("preprocess_cfg.interpolation", "lanczos", "preprocess_cfg.interpolation"),
        ("preprocess_cfg.resize_mode", "stretch", "preprocess_cfg.resize_mode"),
    ],
)  # fmt: skip
def test_key_that_is_wrong_is_named_with_its_file(tmp_path: Path, path: str, value: Any, says: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(changed(path, value)))
    with pytest.raises(UserError) as caught:
        read_configuration(file)
    assert says in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize("raw", [[], "text", None, {}, {"model_cfg": []}, {"model_cfg": {"embed_dim": 4}}])
def test_json_of_something_else_is_no_configuration(raw: Any) -> None:
    with pytest.raises(UserError, match="does not describe an open_clip model"):
        checked(raw, "x.json")


def test_configuration_as_open_clips_own_files_hold_it_is_one(tmp_path: Path) -> None:
    file = tmp_path / "bare.json"
    file.write_text(json.dumps(MODEL_CFG))
    assert read_configuration(file) == {"model_cfg": MODEL_CFG}
