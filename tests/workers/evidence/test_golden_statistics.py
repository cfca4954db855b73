"""What is measured of a tiny open_clip model, against the golden vectors, as a person calls it."""

import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import temporal_merge as tm
from tests.merge_service.statistics import golden

KINDS = {"regmean": "gram", "fisher": "fisher", "mats": "kfac"}


def weights_directory(one: dict, room: Path, name: str) -> Path:
    """A weights directory of a model of the golden set."""
    place = room / Path(name).stem
    place.mkdir()
    shutil.copy(golden.FOLDER / name, place / "open_clip_model.safetensors")
    shutil.copy(golden.FOLDER / one["config"], place / "open_clip_config.json")
    return place


@pytest.mark.parametrize(
    "case", [one for one in golden.CASES if one["kind"] == "statistics"], ids=lambda case: case["name"]
)
def test_measurement_gives_the_golden_vector(case: dict, tmp_path: Path) -> None:
    model = weights_directory(case, tmp_path, case["model"])
    out, base = tmp_path / "found.safetensors", golden.FOLDER / "nano.base.safetensors"
    inputs = load_file(golden.FOLDER / case["inputs"])
    found = tm.measure(KINDS[case["technique"]], model, inputs, out=out, base=base, **case["params"])
    golden.check_tensors(case, found)
    golden.check(case, out)
    if "rows" in case:
        assert dict(found.rows) == case["rows"]


def test_regmean_plus_gives_the_golden_vector(tmp_path: Path) -> None:
    case = golden.case("regmean-plus")
    experts = [weights_directory(case, tmp_path, name) for name in case["experts"]]
    inputs = [{"images": load_file(file)["images"]} for file in golden.files(case, "inputs")]
    out = tmp_path / "merged.safetensors"
    tm.merge(
        "regmean_plus",
        experts,
        golden.FOLDER / case["base"],
        out,
        inputs=inputs,
        any_base=True,
        **case["params"],
    )
    golden.check(case, out)
