"""Inputs whose configurations contradict each other are not merged under one of them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from merge_service.errors import IncompatibleCheckpoint
from merge_service.merge import merge
from tests.merge_service import toys
from tests.merge_service.toys import Files


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def lay(files: Files, name: str, model: Any, configuration: Any) -> Any:
    toys.save(files.room / name / WEIGHTS_FILE, model)
    (files.room / name / CONFIG_FILE).write_text(json.dumps(configuration))
    return files.room / name


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ({"preprocess_cfg": {"mean": [0, 0, 0]}}, "preprocess_cfg.mean [0.5, 0.5, 0.5] and [0, 0, 0]"),
        (
            {"preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "resize_mode": "squash"}},
            "preprocess_cfg.resize_mode",
        ),
        ({"model_cfg": {"quick_gelu": True}}, "model_cfg.quick_gelu False and True"),
        ({"preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "fill_color": 0}}, None),
        ({"model_cfg": {"quick_gelu": False}, "preprocess_cfg": None}, None),
        ([], None),
    ],
)
def test_inputs_made_for_other_pixels_are_refused_where_one_configuration_is_kept(
    files: Files, other: Any, key: str | None
) -> None:
    mine = {"preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "resize_mode": "shortest"}}
    base, expert = lay(files, "base", files.base, mine), lay(files, "e0", files.experts[0], other)
    merge("average", {}, base, [expert], files.room / "merged.safetensors")
    if key is None:
        merge("average", {}, base, [expert], files.room / "merged")
        return
    with pytest.raises(IncompatibleCheckpoint, match=re.escape(key)):
        merge("average", {}, base, [expert], files.room / "merged")
    assert not (files.room / "merged").exists()
