"""`measure`, `merge --statistics` and `merge --coefficients` as a person types them, on the golden vectors."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import temporal_merge as tm
from tests.merge_service.statistics import golden
from workers.models.configuration import unknown_model


def inputs_of(case: dict) -> list[Path]:
    return golden.files(case, "experts")


@pytest.mark.parametrize("name", ["regmean-0.9", "fisher-weights", "mats-kfac-3", "tatr", "lot"])
def test_merge_command_takes_statistics_in_the_order_of_experts(name: str, cli, tmp_path: Path) -> None:
    case, out = golden.case(name), tmp_path / "merged.safetensors"
    settings = [
        word for key, value in case["params"].items() for word in ("--set", f"{key}={json.dumps(value)}")
    ]
    files = [word for file in golden.files(case, "statistics") for word in ("--statistics", file)]
    answer = cli(
        "merge", "--technique", case["technique"], "--base", golden.FOLDER / case["base"], "--any-base", "--no-compare",
        *settings, *files, "--out", out, *inputs_of(case),
    )  # fmt: skip
    assert answer.code == 0, answer.err
    golden.check(case, out)


def test_missing_statistics_end_with_code_2_and_what_to_do(cli, tmp_path: Path) -> None:
    case = golden.case("regmean-1")
    answer = cli("merge", "--technique", "regmean", "--out", tmp_path / "m.safetensors", *inputs_of(case))
    assert (
        answer.code == 2
        and "toy.expert1.gram.safetensors" in answer.err
        and "temporal-merge measure gram" in answer.err
    )


def test_merge_command_takes_a_file_of_coefficients(cli, tmp_path: Path) -> None:
    """The file of AdaMerging's golden case, over plain task arithmetic; logit_scale has no entry and stays the base's."""
    case, out = golden.case("adamerging-apply"), tmp_path / "merged.safetensors"
    answer = cli(
        "merge", "--technique", "task_arithmetic", "--base", golden.FOLDER / case["base"], "--any-base", "--set", "scale=1",
        "--coefficients", golden.FOLDER / case["coefficients"], "--out", out, *inputs_of(case),
    )  # fmt: skip
    assert answer.code == 0, answer.err
    golden.check(case, out)
    text = tmp_path / "c.json"
    held = load_file(golden.FOLDER / case["coefficients"])
    text.write_text(json.dumps({key: value.tolist() for key, value in held.items()}))
    again = tmp_path / "again.safetensors"
    tm.merge(
        "task_arithmetic",
        inputs_of(case),
        golden.FOLDER / case["base"],
        again,
        any_base=True,
        scale=1,
        coefficients=text,
    )
    golden.check(case, again)


def test_techniques_say_what_they_need(cli) -> None:
    found = {one["name"]: one for one in json.loads(cli("techniques", "--json").out)}
    assert found["regmean"]["statistics"] == ["gram"] and "unlabelled" in found["regmean"]["data"]
    assert found["regmean"]["arrival"] == "flat" and found["tsv_m"]["arrival"] == "grows with the experts"
    assert "labelled" in found["tatr"]["data"] and found["wudi"]["data"] is None
    assert found["task_arithmetic"]["state"] == "4 B per weight"


@pytest.mark.parametrize("kind", ["gram", "fisher"])
def test_measure_command_measures_the_training_split_of_a_task(kind: str, cli, tmp_path: Path) -> None:
    model, out = tmp_path / "expert", tmp_path / "expert.safetensors"
    shutil.copytree("configs/models/tiny-clip", model)
    asked = ("measure", kind, model, "--study", "configs/smoke.yaml", "--out", out, "--examples", 8)
    answer = cli(*asked, "--task", "letters", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["examples"] == 8 and found["kind"] == kind and found["bytes"] == out.stat().st_size
    assert cli(*asked, "--task", "letters").code == 2  # the file is there
    wrong = cli(*asked, "--task", "letter", "--force")
    assert wrong.code == 2 and "did you mean letters" in wrong.err


def test_learn_command_learns_on_the_training_split_of_tasks(cli, tmp_path: Path) -> None:
    base, rng = Path("configs/models/tiny-clip"), np.random.default_rng(0)
    start = load_file(base / "open_clip_model.safetensors")
    experts = [tmp_path / f"e{number}.safetensors" for number in (1, 2)]
    for expert in experts:
        noisy = {
            name: one + rng.normal(0, 0.01, one.shape).astype(np.float32) if one.ndim else one
            for name, one in start.items()
        }
        save_file(noisy, expert)
    out = tmp_path / "c.safetensors"
    asked = ("learn", "adamerging", *experts, "--base", base, "--study", "configs/smoke.yaml", "--out", out)
    few = ("--param", "steps=2", "--param", "batch_size=4", "--param", "examples=8")
    answer = cli(*asked, *few, "--tasks", "letters,skin_tone", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["steps"] == 2 and found["experts"] == 2 and found["adapted_on"] == "training"
    merged = tmp_path / "merged"
    said = ("--coefficients", out, "--base", base, "--out", merged, *experts)
    assert cli("merge", "--technique", "adamerging", *said).code == 0
    other = cli("merge", "--technique", "task_arithmetic", *said, "--force")
    assert other.code == 2 and "was learned for adamerging" in other.err
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    told = str(unknown_model(experts[0]))
    assert "is a model of transformers ('llama'), and only open_clip models are measured" in told
    assert (merged / "open_clip_model.safetensors").is_file()
    assert cli(*asked, *few, "--tasks", "letters,skin_tone").code == 2  # the file is there
    wrong = cli(*asked, "--tasks", "letter", "--force")
    assert wrong.code == 2 and "did you mean letters" in wrong.err
    few = ("--param", "steps=0", "--param", "examples=4")
    marked = cli(*asked, *few, "--tasks", "letters", "--force", "--adapt-on-test")
    assert marked.code == 0 and "TEST images" in marked.out


def test_study_with_a_technique_that_must_learn_is_planned(cli, tmp_path: Path) -> None:
    study, text = tmp_path / "study.yaml", Path("configs/smoke.yaml").read_text()
    learned = "[{init: base, deploy: ema, technique: adamerging}]"
    study.write_text(text.replace("[offline_merging, best_in_time]", learned))
    answer = cli("plan", study, "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["steps"]["learn"]["unique"] == 2 and 0 < found["gflops_learning"] < found["gflops"]
