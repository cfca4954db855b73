"""`temporal-merge merge` on files: the golden numbers through the command line, and mistakes that end with code 2."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from merge_service import techniques
from merge_service.merge import merge
from pipeline import api
from pipeline.cli.show_files import parameters_from
from pipeline.console import spell_out
from pipeline.merging.compare import _named
from tests.merge_service import measured
from tests.world import command

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "techniques.json").read_text())
CASES = [case for case in GOLDEN["cases"] if case.get("form", "merge") == "merge"]


def options(params: dict[str, Any]) -> list[str]:
    return [word for key, value in params.items() for word in ("--set", f"{key}={json.dumps(value)}")]


def write(path: Path, values: np.ndarray, tensors: list) -> Path:
    save_file({name: np.ascontiguousarray(values[start:stop]) for name, start, stop in tensors}, path)
    return path


def golden_files(case: dict, room: Path) -> tuple[Path, list[Path], list, np.ndarray]:
    """(base, experts, tensors, expected merged vector) of a golden case, the files written into `room`."""
    start = np.array(case.get("base", GOLDEN["base"]), np.float32)
    taus = [np.array(tau, np.float32) for tau in case.get("tau", GOLDEN["tau"])]
    tensors = case.get("tensors", [["weight", 0, start.size]])
    experts = [
        write(room / f"{number}.safetensors", start + taus[number - 1], tensors)
        for number in case.get("experts", range(1, len(taus) + 1))
    ]
    expected = case["theta"] if "theta" in case else start + np.array(case["delta"], np.float32)
    return write(room / "base.safetensors", start, tensors), experts, tensors, np.array(expected, np.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_merge_command_gives_the_golden_vector(case: dict, cli, tmp_path: Path) -> None:
    base, experts, tensors, expected = golden_files(case, tmp_path)
    out = tmp_path / "out.safetensors"
    arguments = ["merge", "--technique", case["technique"], "--base", base, "--out", out]
    answer = cli(*arguments, *options(case["params"]), *experts)
    assert answer.code == 0, answer.err
    merged = load_file(out)
    result = np.concatenate([merged[name] for name, _, _ in tensors])
    np.testing.assert_allclose(result, expected, rtol=0, atol=case.get("tolerance", 0))


def test_merge_as_a_process_gives_the_golden_vector_and_says_what_it_did(tmp_path: Path) -> None:
    case = next(case for case in CASES if case["technique"] == "ties" and case.get("experts") is None)
    base, experts, tensors, expected = golden_files(case, tmp_path)
    out = tmp_path / "m.safetensors"
    arguments = ["merge", "--technique", "ties", "--base", base, "--out", out, "--json"]
    answer = command(*arguments, *options(case["params"]), *experts)
    assert answer.returncode == 0, answer.stderr
    said = json.loads(answer.stdout)
    assert said["out"] == str(out) and said["technique"] == "ties" and said["experts"] == 3
    merged = load_file(out)
    np.testing.assert_array_equal(np.concatenate([merged[name] for name, _, _ in tensors]), expected)


@pytest.mark.parametrize("name", measured.GIVEN)
def test_every_technique_merges_from_the_command_line_as_from_python(name: str, cli, tmp_path: Path) -> None:
    in_blocks = next(case for case in CASES if "tensors" in case)
    base, experts, _, _ = golden_files(in_blocks, tmp_path)
    experts = [measured.of_technique(name, one) for one in experts[: techniques.get(name).arity]]
    told, called = tmp_path / "told.safetensors", tmp_path / "called.safetensors"
    answer = cli("merge", "--technique", name, "--base", base, "--out", told, "--threads", 2, *experts)
    assert answer.code == 0, answer.err
    merge(name, {}, base, experts, called)
    assert told.read_bytes() == called.read_bytes()


def test_merge_on_a_par_with_the_authors_is_that_of_the_translated_parameters(
    cli, files: dict[str, Path], tmp_path: Path
) -> None:
    told, called = tmp_path / "told.safetensors", tmp_path / "called.safetensors"
    line = ["merge", "--technique", "slerp", "--parity", "fomo_in_flux", "--set", "weight=0.9", "--out", told]
    assert cli(*line, files["one"], files["two"]).code == 0
    report = api.merge("slerp", [files["one"], files["two"]], out=called, parity="fomo_in_flux", weight=0.9)
    assert told.read_bytes() == called.read_bytes()
    assert report.params == {"weight": 0.1, "logit_scale": "unclamped"}  # type: ignore[union-attr]
    states = [load_file(files[name]) for name in ("one", "two")]
    merged = api.merge("slerp", states, parity="fomo_in_flux", weight=0.9)
    np.testing.assert_array_equal(merged["w"], load_file(told)["w"])  # type: ignore[index]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Checkpoints that fit together, and some that do not."""
    rng, written = np.random.default_rng(0), {}
    for name in ("base", "one", "two"):
        weights = {"w": rng.normal(size=(3, 4)).astype(np.float32), "b": np.ones(2, np.float32)}
        save_file(weights, tmp_path / f"{name}.safetensors")
    save_file(weights | {"w": weights["w"].T.copy()}, tmp_path / "shape.safetensors")
    save_file(weights | {"b": np.array([1, np.nan], np.float32)}, tmp_path / "nan.safetensors")
    (tmp_path / "garbage.safetensors").write_bytes(b"not a checkpoint" * 9)
    for path in tmp_path.iterdir():
        written[path.stem] = path
    return written


MISTAKES = {
    "other shapes": ("ties --base base one shape", ["shape.safetensors", "w has shape [4, 3], not [3, 4]"]),
    "a NaN": ("ties --base base one nan", ["nan.safetensors", "b has 1 of 2 values NaN or infinite"]),
    "no base": ("ties one two", ["ties", "give the base (--base)"]),
    "misspelt parameter": ("ties --base base --set densty=0.2 one two", ["'densty'", "did you mean density"]),
    "impossible density": ("ties --base base --set density=2 one two", ["density = 2", "0 < x <= 1"]),
    "no value": ("ties --base base --set density one two", ["--set 'density'", "--set density=0.2"]),
    "not YAML": ("ties --base base --set density=[ one two", ["--set 'density=['", "not valid YAML"]),
    "unknown technique": ("tiess --base base one two", ["'tiess'", "did you mean ties"]),
    "no such expert": ("average one nowhere", ["nowhere.safetensors does not exist"]),
    "no such base": ("ties --base nowhere one two", ["nowhere.safetensors does not exist"]),
    "not a checkpoint": ("average one garbage", ["garbage.safetensors", "not safetensors"]),
    "no size": ("average --shard-size 5apples one two", ["'5apples' is not a size", "5GB"]),
    "shards too small": ("average --shard-size 0 one two", ["'0' is not a size"]),
    "unknown parity": (
        "ties --base base --parity fomo one two",
        ["unknown parity 'fomo'", "there is fomo_in_flux"],
    ),
    "parity without it": (
        "iso_c --base base --parity fomo_in_flux one two",
        ["has no iso_c", "it has average"],
    ),
    "three for slerp": ("slerp one two base", ["slerp merges exactly 2 checkpoints, not 3"]),
}


def test_parameters_are_numbers_and_words_as_in_a_study() -> None:
    given = parameters_from(["floor=1e-06", "weights=[5e-1, 2]", "scope=all", "trim=true", "seed=010"])
    assert given == {"floor": 1e-6, "weights": [0.5, 2], "scope": "all", "trim": True, "seed": 10}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_merge_refuses_a_mistake_in_one_line_and_writes_nothing(
    mistake: str, cli, files: dict[str, Path], tmp_path: Path
) -> None:
    line, says = MISTAKES[mistake]
    names = {*files, "nowhere"}
    words = [tmp_path / f"{word}.safetensors" if word in names else word for word in line.split()]
    before = sorted(tmp_path.iterdir())
    answer = cli("merge", "--out", tmp_path / "m.safetensors", "--technique", *words)
    assert answer.code == 2 and answer.out == ""
    assert answer.err.startswith("error: ") and answer.err.count("\n") == 1
    assert all(words in answer.err for words in says), answer.err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("line", ["average one", "average --out m.safetensors", "--out m.safetensors one"])
def test_merge_without_what_it_needs_says_how_it_is_used(line: str, cli, files: dict[str, Path]) -> None:
    words = [files.get(word, word) for word in line.split()]
    answer = cli("merge", *(["--technique"] if words[0] == "average" else []), *words)
    assert answer.code == 2 and "Usage:" in answer.err and "Missing" in answer.err


def test_merge_makes_the_directory_of_its_output(cli, files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "not" / "there" / "m.safetensors"
    assert cli("merge", "--technique", "average", "--out", out, files["one"], files["two"]).code == 0
    assert set(load_file(out)) == {"w", "b"}


def test_merge_never_writes_over_its_inputs(cli, files: dict[str, Path], tmp_path: Path) -> None:
    before = files["one"].read_bytes()
    answer = cli("merge", "--technique", "average", "--out", files["one"], files["one"], files["two"])
    assert answer.code == 2 and "is one of the inputs" in answer.err
    assert files["one"].read_bytes() == before


def test_merge_into_a_place_that_cannot_be_written_is_refused(cli, files: dict[str, Path]) -> None:
    out = files["base"] / "m.safetensors"
    answer = cli("merge", "--technique", "average", "--out", out, files["one"], files["two"])
    assert answer.code == 2, answer.err
    assert str(out) in answer.err and answer.err.count("\n") == 1


def test_merge_writes_shards_and_names_the_index_to_open(cli, files: dict[str, Path], tmp_path: Path) -> None:
    out, whole = tmp_path / "cut" / "m.safetensors", tmp_path / "whole.safetensors"
    inputs = [files["one"], files["two"]]
    answer = cli("merge", "--technique", "average", "--out", out, "--shard-size", "50B", "--json", *inputs)
    index = Path(f"{out}.index.json")
    assert answer.code == 0 and json.loads(answer.out)["out"] == str(index)
    assert cli("merge", "--technique", "average", "--out", whole, *inputs).code == 0
    single = load_file(whole)
    for name, shard in json.loads(index.read_text())["weight_map"].items():
        np.testing.assert_array_equal(load_file(index.parent / shard)[name], single[name])
    before = {path: path.read_bytes() for path in index.parent.iterdir()}
    assert len(before) == 3
    for target in (out, index):  # whatever its form, a name that is an input stays what it is
        answer = cli("merge", "--technique", "average", "--out", target, index, files["one"])
        assert answer.code == 2 and "is one of the inputs" in answer.err
    assert {path: path.read_bytes() for path in index.parent.iterdir()} == before


def test_merge_keeps_thresholds_when_asked_and_says_when_it_cannot(
    cli, files: dict[str, Path], tmp_path: Path
) -> None:
    line = ["merge", "--technique", "ties", "--base", files["base"], "--out", tmp_path / "m.safetensors"]
    assert cli(*line, files["one"], files["two"]).code == 0
    assert not list(tmp_path.glob("*.limits.json"))
    (tmp_path / "two.safetensors.limits.json").mkdir()
    answer = cli(*line, "--force", "--keep-thresholds", files["one"], files["two"])
    assert answer.code == 0 and (tmp_path / "one.safetensors.limits.json").is_file()
    assert (
        answer.err.startswith("note: ")
        and "thresholds were not kept" in answer.err
        and answer.err.count("\n") == 1
    )


def test_merge_is_the_same_whatever_the_order_of_files_and_names_what_it_is_told(
    cli, files: dict[str, Path], tmp_path: Path
) -> None:
    outs = [tmp_path / f"m{number}.safetensors" for number in range(3)]
    line = [
        "merge",
        "--technique",
        "dare",
        "--set",
        "density=0.5",
        "--base",
        files["base"],
        "--json",
        "--out",
    ]
    one, two = files["one"], files["two"]
    answers = [
        cli(*line, outs[0], one, two),
        cli(*line, outs[1], two, one),
        cli(*line, outs[2], "--id", f"animals={two}", one, two),
    ]
    assert [answer.code for answer in answers] == [0, 0, 0], answers
    first, second, third = map(load_file, outs)
    np.testing.assert_array_equal(first["w"], second["w"])
    assert not np.array_equal(first["w"], third["w"])
    inputs = json.loads(answers[2].out)["inputs"]
    assert [entry["file"] for entry in inputs] == ["one.safetensors", "two.safetensors"]
    assert (
        inputs[1]["id"] == "animals" and inputs[1]["sha256"] == hashlib.sha256(two.read_bytes()).hexdigest()
    )
    with safe_open(outs[2], "numpy") as made:
        record = json.loads(made.metadata()["temporal_merge"])
    assert record["inputs"] == inputs and record["base"]["file"] == "base.safetensors"
    assert {"technique", "params", "versions", "form"} <= record.keys()


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (["--id", "animals"], "write NAME=FILE"),
        (["--id", "animals=nowhere.safetensors"], "none of the experts"),
        (["--strip-prefix", "module."], "no tensor name begins with the prefix 'module.'"),
    ],
)
def test_merge_refuses_a_name_or_a_prefix_that_fits_nothing(
    option: list[str], says: str, cli, files: dict[str, Path], tmp_path: Path
) -> None:
    line = ["merge", "--technique", "average", "--out", tmp_path / "m.safetensors", *option]
    answer = cli(*line, files["one"], files["two"])
    assert answer.code == 2 and says in answer.err and answer.err.count("\n") == 1, answer.err


def test_merge_says_which_names_it_read_without_a_prefix(cli, files: dict[str, Path], tmp_path: Path) -> None:
    wrapped = tmp_path / "ddp.safetensors"
    save_file({f"module.{name}": value for name, value in load_file(files["two"]).items()}, wrapped)
    expected, line = tmp_path / "expected.safetensors", ["merge", "--technique", "average", "--out"]
    assert cli(*line, expected, files["one"], files["two"]).code == 0
    for option in ([], ["--strip-prefix", "module."]):
        answer = cli(*line, tmp_path / "m.safetensors", "--force", *option, files["one"], wrapped)
        assert answer.code == 0 and ("without their prefix 'module.'" in answer.err) == (not option)
        np.testing.assert_array_equal(load_file(tmp_path / "m.safetensors")["w"], load_file(expected)["w"])


def test_merge_refuses_experts_of_another_base_unless_it_is_told_to_take_them(cli, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path in paths:
        save_file({"w": rng.normal(size=(32, 32)).astype(np.float32)}, path)
    line = ["merge", "--technique", "ties", "--base", paths[0], "--out", tmp_path / "m.safetensors"]
    answer = cli(*line, *paths[1:])
    assert answer.code == 2 and "was not trained from the base" in answer.err and "--any-base" in answer.err
    assert (
        re.search(r"is 1\.\d\d in the median", answer.err)
        and "at most 0.5" in answer.err
        and answer.err.count("\n") == 1
    )
    assert cli(*line, "--any-base", *paths[1:]).code == 0


def test_merge_of_a_hundred_experts_needs_few_open_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(8, 8)).astype(np.float32)
    for number in range(100):
        moved = base + 0.1 * rng.normal(size=base.shape).astype(np.float32)
        save_file({"w": moved}, tmp_path / f"e{number:03}.safetensors")
    answer = subprocess.run(
        f"ulimit -n 64; exec {sys.executable} -m pipeline.cli merge --technique average --out m.safetensors e*.safetensors",
        shell=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True, text=True, executable="/bin/bash",
    )  # fmt: skip
    assert answer.returncode == 0 and "average of 100 checkpoints" in answer.stdout, answer.stderr


ASCII = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def test_commands_print_on_a_terminal_that_has_ascii_only(tmp_path: Path) -> None:
    shown = run_in_ascii("techniques", "ties")
    assert shown.returncode == 0 and b"tau^_i" in shown.stdout and b"theta" in shown.stdout
    missing = run_in_ascii(
        "merge", "--technique", "average", "--out", tmp_path / "m.safetensors", tmp_path / "größe.safetensors"
    )
    assert missing.returncode == 2 and "größe.safetensors does not exist".encode() in missing.stderr
    assert run_in_ascii("report", tmp_path / "näh").returncode == 2
    for name in measured.GIVEN:
        assert list(_spelled_out(techniques.get(name).formula)) == []


def run_in_ascii(*words: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *map(str, words)],
        env={**os.environ, **ASCII}, cwd=Path(__file__).parents[3], capture_output=True,
    )  # fmt: skip


def _spelled_out(text: str) -> list[str]:
    """The signs of a formula that an ASCII terminal shows only as placeholders."""
    spell_out()
    return [sign for sign in text if b"?" in sign.encode("ascii", "spelled-out")]


def test_merge_replaces_what_is_there_only_when_asked(cli, files: dict[str, Path], tmp_path: Path) -> None:
    line = [
        "merge",
        "--technique",
        "average",
        "--out",
        tmp_path / "m.safetensors",
        files["one"],
        files["two"],
    ]
    assert cli(*line).code == 0
    before = (tmp_path / "m.safetensors").read_bytes()
    other = [*line[:-1], files["base"]]
    answer = cli(*other)
    assert answer.code == 2 and "m.safetensors is there already" in answer.err and "--force" in answer.err
    assert (tmp_path / "m.safetensors").read_bytes() == before
    assert cli(*other, "--force").code == 0
    assert (tmp_path / "m.safetensors").read_bytes() != before
    (tmp_path / "shards.safetensors.index.json").touch()
    line[4] = tmp_path / "shards.safetensors"
    assert "shards.safetensors.index.json is there already" in cli(*line).err


def test_merge_says_how_task_vectors_lie(cli, files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    line = [
        "merge",
        "--technique",
        "task_arithmetic",
        "--base",
        files["base"],
        "--out",
        out,
        files["one"],
        files["two"],
    ]
    said = json.loads(cli(*line, "--json").out)["comparison"]
    base, one, two, merged = (
        load_file(path)["w"].astype(np.float64) for path in (files["base"], files["one"], files["two"], out)
    )
    taus = [one - base, two - base, merged - base]
    assert said["names"] == ["one.safetensors", "two.safetensors", "merged"]
    np.testing.assert_allclose(said["norms"], [np.linalg.norm(tau) for tau in taus], rtol=1e-6)
    expected = np.vdot(taus[0], taus[1]) / np.linalg.norm(taus[0]) / np.linalg.norm(taus[1])
    assert said["cosines"][0][1] == pytest.approx(expected, abs=1e-6)
    assert said["sign_conflicts"][0][0] == 0 and 0 <= said["sign_conflicts"][0][1] <= 1
    shown = cli(*line, "--force").out
    assert "task vectors" in shown and f"{said['norms'][2]:.4g}" in shown
    assert "comparison" not in json.loads(cli(*line, "--force", "--json", "--no-compare").out)


def test_large_checkpoints_are_compared_only_when_asked(cli, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("pipeline.merging.compare.LARGE_BYTES", 10)
    line = ["merge", "--technique", "average", "--base", files["base"], "--out", tmp_path / "m.safetensors", files["one"], files["two"]]  # fmt: skip
    answer = cli(*line)
    assert "not compared: " in answer.err and "task vectors" not in answer.out
    assert "task vectors" in cli(*line, "--force", "--compare").out
    without = [*line[:3], *line[5:]]
    assert "none was given" in cli(*without, "--force", "--compare").err


def test_experts_in_folders_of_their_own_are_named_by_their_folders() -> None:
    """All files of a run's experts have one name, which would only push the rest out of the table."""
    names = [Path(f"runs/a/{name}/open_clip_model.safetensors") for name in ("t1-letters", "t2-scripts")]
    assert list(_named(names)) == ["t1-letters", "t2-scripts"]
    assert list(_named([Path("a/one.safetensors"), Path("a/two.safetensors")])) == ["one.safetensors", "two.safetensors"]  # fmt: skip
    assert list(_named([Path("a/x.st"), Path("b/x.st"), Path("b/y.st")])) == ["a/x.st", "b/x.st", "b/y.st"]
