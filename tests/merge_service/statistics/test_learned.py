"""Merges with learned coefficients: the golden vectors, the same bytes however they are computed, and files that do not belong."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from merge_service.checkpoints import Checkpoint, sha256_of
from merge_service.errors import TechniqueError
from merge_service.merge import fold, merge
from merge_service.merging import Rules
from merge_service.statistics import About, write
from merge_service.techniques import get, names
from tests.merge_service.statistics import golden

LOOSE = Rules(any_base=True)
BASE = golden.FOLDER / "toy.base.safetensors"
EXPERTS = [golden.FOLDER / f"toy.expert{number}.safetensors" for number in (1, 2, 3)]
TABLE = {"*": np.array([0.5, -0.25, 0.125])}
LEARNED = [name for name in names() if get(name).learned]


def merged(technique: str, file: Path, out: Path, experts=EXPERTS, base=BASE, params=None, **more):
    return merge(
        technique, params or {}, base, experts, out, rules=LOOSE, statistics=[file] * len(experts), **more
    )


def written(out: Path, tensors=TABLE, **about) -> Path:
    write(out, tensors, About("coefficients", {}, 0, **about))
    return out


@pytest.mark.parametrize(
    "case",
    golden.cases("merge", "adamerging", "supermerge", "dam", "concrete"),
    ids=lambda case: case["name"],
)
def test_merge_gives_the_golden_vector(case: dict, tmp_path: Path) -> None:
    file, out = golden.FOLDER / case["coefficients"], tmp_path / "out.safetensors"
    if "noise" in case:  # a mask that was drawn is that of shifted logits
        logits, drawn = load_file(file), load_file(golden.FOLDER / case["noise"])
        file = tmp_path / "shifted.safetensors"
        save_file(
            {n: x + np.log(drawn[n] / (1 - drawn[n])) for n, x in logits.items()},
            file,
            {"technique": "concrete"},
        )
    merged(case["technique"], file, out, params=case["params"])
    golden.check(case, out)


@pytest.mark.parametrize(
    "case", golden.cases("merge", "adamerging", "dam", "concrete"), ids=lambda case: case["name"]
)
def test_threads_and_blocks_change_no_byte(case: dict, tmp_path: Path) -> None:
    file, files = (
        golden.FOLDER / case["coefficients"],
        [tmp_path / "a.safetensors", tmp_path / "b.safetensors"],
    )
    merged(case["technique"], file, files[0], params=case["params"])
    merged(case["technique"], file, files[1], params=case["params"], threads=3, block=1)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_equal_coefficients_are_task_arithmetic_but_for_the_temperature(tmp_path: Path) -> None:
    file = written(tmp_path / "c.safetensors", {"*": np.full(3, 0.5)})
    merged("adamerging", file, tmp_path / "a.safetensors")
    merge("task_arithmetic", {"scale": 0.5}, BASE, EXPERTS, tmp_path / "b.safetensors", rules=LOOSE)
    got, plain = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    for name in got:
        right = load_file(BASE)[name] if name == "logit_scale" else plain[name]
        np.testing.assert_allclose(got[name], right, rtol=1e-6, atol=1e-7)


def test_one_expert_with_coefficient_one_is_the_expert(tmp_path: Path) -> None:
    file = written(tmp_path / "c.safetensors", {"*": np.ones(1)})
    merged("adamerging", file, tmp_path / "out.safetensors", EXPERTS[:1])
    got, expert = load_file(tmp_path / "out.safetensors"), load_file(EXPERTS[0])
    for name in got.keys() - {"logit_scale"}:
        np.testing.assert_allclose(got[name], expert[name], rtol=1e-6, atol=1e-7)


def test_dam_of_one_column_is_that_expert_and_of_equal_ones_the_mean(tmp_path: Path) -> None:
    experts = [load_file(path) for path in EXPERTS]
    for number, factors in enumerate((np.eye(3)[1], np.full(3, 1 / 3))):
        columns = load_file(golden.FOLDER / "toy.dam.safetensors")
        alike = {name: np.broadcast_to(factors[:, None], one.shape).copy() for name, one in columns.items()}
        out = tmp_path / f"{number}.safetensors"
        merged("dam", written(tmp_path / f"c{number}", alike), out)
        for name, value in load_file(out).items():
            right = experts[1][name] if number == 0 else sum(one[name].astype(float) for one in experts) / 3
            np.testing.assert_allclose(value, right, rtol=1e-5, atol=1e-6, err_msg=name)


def test_mask_of_equal_logits_changes_nothing(tmp_path: Path) -> None:
    logits = {name: np.full(one.shape, 3.0) for name, one in load_file(BASE).items() if name != "logit_scale"}
    merged("concrete", written(tmp_path / "c", logits), tmp_path / "a.safetensors")
    merge("task_arithmetic", {"logit_scale": "base"}, BASE, EXPERTS, tmp_path / "b.safetensors", rules=LOOSE)
    got, plain = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    for name in got:
        np.testing.assert_allclose(got[name], plain[name], rtol=1e-6, atol=1e-7)


def test_fold_of_two_models_is_their_merge(tmp_path: Path) -> None:
    file = written(tmp_path / "c.safetensors", {"*": np.array([1.0, 0.5])}, parameters={"start": [1.0, 0.5]})
    merged("adamerging", file, tmp_path / "a.safetensors", EXPERTS[:2])
    fold(
        "adamerging", {}, BASE, *EXPERTS[:2], tmp_path / "b.safetensors", rules=LOOSE, statistics=[file, file]
    )
    got, folded = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert all(got[name].tobytes() == folded[name].tobytes() for name in got)


def test_parameters_without_coefficients_keep_what_learning_began_with(tmp_path: Path) -> None:
    file = written(tmp_path / "c", {"visual.proj": np.zeros(3)}, parameters={"start": 0.5})
    merged("adamerging", file, tmp_path / "a.safetensors")
    merge("task_arithmetic", {"scale": 0.5}, BASE, EXPERTS, tmp_path / "b.safetensors", rules=LOOSE)
    got, plain, base = (
        load_file(one) for one in (tmp_path / "a.safetensors", tmp_path / "b.safetensors", BASE)
    )
    for name in got:
        right = base if name in ("visual.proj", "logit_scale") else plain
        np.testing.assert_allclose(got[name], right[name], rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("technique", LEARNED)
def test_merge_without_a_file_is_refused(technique: str, tmp_path: Path) -> None:
    with pytest.raises(TechniqueError, match=rf"temporal-merge learn {technique}"):
        merge(technique, {}, BASE, EXPERTS, tmp_path / "out", rules=LOOSE)


def test_files_of_other_merges_are_refused_and_touch_nothing(tmp_path: Path) -> None:
    experts, out = tuple(sha256_of(path) for path in EXPERTS), tmp_path / "out.safetensors"
    right = {"technique": "adamerging", "experts": experts, "base_sha256": sha256_of(BASE)}
    merged("adamerging", written(tmp_path / "right", **right), out)
    before = out.read_bytes()
    for change, given, words in (
        ({"technique": "dam"}, EXPERTS, "learned for dam"),
        ({"experts": experts[::-1]}, EXPERTS, r"number 1 is not .*in their order there"),
        ({}, EXPERTS[:2], "for 3 experts, and there are 2"),
        ({"base_sha256": experts[0]}, EXPERTS, "another base"),
    ):
        file = written(tmp_path / "wrong", **{**right, **change})
        with pytest.raises(TechniqueError, match=words):
            merged("adamerging", file, out, given)
    with pytest.raises(TechniqueError, match="kind gram"):
        merged("adamerging", golden.FOLDER / "toy.gram1.safetensors", out)
    bad = written(tmp_path / "bad", {"visual.proj": np.zeros((3, 5))}, technique="dam")
    with pytest.raises(TechniqueError, match=r"5 coefficients for visual.proj"):
        merged("dam", bad, out)
    assert out.read_bytes() == before


def test_merge_adapted_on_test_images_says_so(tmp_path: Path) -> None:
    file, out = written(tmp_path / "c", parameters={"adapted_on": "test"}), tmp_path / "out.safetensors"
    report = merged("adamerging", file, out, params={"adapted_on": "test"})
    assert any("test-time adaptation" in note for note in report.notes)
    with Checkpoint.open(out) as found:
        assert json.loads(found.metadata["temporal_merge"])["params"]["adapted_on"] == "test"
