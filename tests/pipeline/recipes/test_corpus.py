"""Recipes of mergekit of every kind: the same numbers as mergekit, or the reason why not.

`tests/golden/mergekit.safetensors` holds mergekit's results, made by `reference.py`; with the path of an environment's Python that has
mergekit in MERGEKIT_PYTHON they are made anew and compared as well.
"""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from merge_service.errors import UserError
from pipeline.recipes.carry_out import Output, merge_recipe
from pipeline.recipes.read import read_recipe
from tests.pipeline.recipes.tiny import write_models

CORPUS = Path(__file__).parent / "corpus"
ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "mergekit.safetensors"
FILES = sorted(CORPUS.glob("*.yml"))
REFUSED = [path for path in FILES if path.read_text().startswith("# refused")]
RANDOM = [path for path in FILES if path.read_text().startswith("# random")]
EQUAL = [path for path in FILES if not path.read_text().startswith("# ")]
TRIMMED = {"ties": 3, "ties_density_gradient": 4, "unequal_densities": 4, "breadcrumbs_ties": 2}
"""Recipes with thresholds, and the most elements of a tensor that may differ: for each expert those next to the threshold's rank.

TIES here keeps one more than density * n (the authors' convention, with n - density * n rounded down), mergekit int(density * n).
"""
AGAIN = (
    "slerp_shared",
    "ties_density_gradient",
    "passthrough_scaled",
    "linear_sum",
    "modules",
    "task_arithmetic_by_part",
    "out_dtype",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    room = tmp_path_factory.mktemp("models")
    write_models(room)
    return room


@cache
def golden() -> dict[str, dict[str, np.ndarray]]:
    return by_recipe(GOLDEN)


def by_recipe(path: Path) -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, values in load_file(path).items():
        name, _, tensor = key.partition(":")
        found.setdefault(name, {})[tensor] = values
    return found


def merged(path: Path, models: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    monkeypatch.chdir(models)
    merge_recipe(read_recipe(path).recipe, Output(out))
    return load_file(out / "model.safetensors")


def compare(name: str, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for tensor, values in theirs.items():
        assert (ours[tensor].dtype, ours[tensor].shape) == (values.dtype, values.shape)
        unequal = ~np.isclose(
            ours[tensor].astype(np.float32), values.astype(np.float32), rtol=1e-6, atol=1e-6
        )
        assert unequal.sum() <= TRIMMED.get(name, 0), f"{name}: {tensor} differs in {unequal.sum()} elements"


def test_corpus_has_recipes_of_every_kind() -> None:
    assert len(FILES) >= 25 and len(EQUAL) >= 25
    text = "".join(path.read_text() for path in FILES)
    for key in (
        "models:",
        "slices:",
        "modules:",
        "layer_range",
        "filter:",
        "base_model",
        "out_dtype",
        "tokenizer_source",
        "---",
    ):
        assert key in text


@pytest.mark.parametrize("path", EQUAL, ids=lambda path: path.stem)
def test_recipe_gives_the_numbers_of_mergekit(path: Path, models: Path, tmp_path: Path, monkeypatch) -> None:
    compare(path.stem, merged(path, models, tmp_path / "out", monkeypatch), golden()[path.stem])


@pytest.mark.parametrize("path", [CORPUS / f"{name}.yml" for name in AGAIN], ids=AGAIN)
def test_translated_recipe_is_read_again_and_gives_the_same_bytes(
    path: Path, models: Path, tmp_path: Path, monkeypatch
) -> None:
    first = merged(path, models, tmp_path / "first", monkeypatch)
    again = merge_recipe(read_recipe(tmp_path / "first" / "merge.yaml").recipe, Output(tmp_path / "again"))
    second = load_file(tmp_path / "again" / "model.safetensors")
    assert {name: one.tobytes() for name, one in first.items()} == {
        name: one.tobytes() for name, one in second.items()
    }
    assert again.out == tmp_path / "again"


@pytest.mark.parametrize("path", REFUSED, ids=lambda path: path.stem)
def test_recipe_that_cannot_be_done_is_refused_with_the_reason(
    path: Path, models: Path, tmp_path: Path, monkeypatch
) -> None:
    reason = path.read_text().splitlines()[0].removeprefix("# refused: ")
    with pytest.raises(UserError, match=re.escape(reason)):
        merged(path, models, tmp_path / "out", monkeypatch)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", RANDOM, ids=lambda path: path.stem)
def test_recipe_with_random_masks_is_done_with_masks_of_our_own(
    path: Path, models: Path, tmp_path: Path, monkeypatch
) -> None:
    first, second = (merged(path, models, tmp_path / name, monkeypatch) for name in ("first", "second"))
    base = load_file(models / "base" / "model.safetensors")
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    assert any((first[name] != base[name]).any() and (first[name] == base[name]).any() for name in first)


def test_tokenizer_of_the_base_is_accepted(models: Path, tmp_path: Path, monkeypatch) -> None:
    assert merged(CORPUS / "tokenizer_base.yml", models, tmp_path / "out", monkeypatch)


@pytest.mark.slow
@pytest.mark.skipif(
    "MERGEKIT_PYTHON" not in os.environ,
    reason="MERGEKIT_PYTHON is not set: mergekit is in an environment of its own",
)
def test_golden_numbers_are_those_of_the_installed_mergekit(tmp_path: Path) -> None:
    command = [
        os.environ["MERGEKIT_PYTHON"],
        "-m",
        "tests.pipeline.recipes.reference",
        str(tmp_path / "now.safetensors"),
    ]
    subprocess.run(
        command, cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=sys.stderr
    )
    now, held = by_recipe(tmp_path / "now.safetensors"), golden()
    assert now.keys() == held.keys()
    for name, tensors in held.items():
        for tensor, values in tensors.items():
            np.testing.assert_allclose(now[name][tensor], values, rtol=1e-6, atol=1e-6)
