"""The command line for data, a model and a technique of one's own: import-data, init, --module."""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from merge_service.errors import TechniqueError
from merge_service.techniques import forget_table, own, registry
from merge_service.techniques.definition import Origin
from pipeline.study.config import load_study
from tests.pipeline.cli.test_cli import refused
from tests.world import MODEL, Cluster, World, command

MODULE = """
import temporal_merge as tm


@tm.technique("halved", formula="scale · mean / 2")
def halved(xp, params, blocks):
    return sum(blocks) / len(blocks) / 2
"""


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove what a test declares, and the modules that it has written."""
    monkeypatch.setattr(registry, "_declared", {})
    forget_table()
    yield
    monkeypatch.undo()
    forget_table()
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with pictures, a network, checkpoints and a module."""
    for number in range(10):
        for at, name in enumerate(("stop_sign", "go_sign")):
            (tmp_path / "signals" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (200 * at, number, 0)).save(
                tmp_path / "signals" / name / f"{number}.png"
            )
    (tmp_path / "tiny.json").write_text(json.dumps(MODEL))
    (tmp_path / "my_own.py").write_text(MODULE)
    rng = np.random.default_rng(0)
    for name in ("base", "one", "two"):
        save_file({"w": rng.normal(size=(4, 3)).astype(np.float32)}, tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- data and a study -------------------------------------------------------------------------------------------------


def test_imported_data_and_a_written_study_plan_as_they_are(desk: Path, cli: Any) -> None:
    told = cli("import-data", "signals", "--out", "my_data", "--template", "a {c}")
    assert told.out == "my_data/signals: written: 2 classes, 14 train, 2 val, 4 test; role adaptation\n"
    answer = cli(
        "import-data", "signals", "--out", "my_data", "--name", "other", "--role", "held_out", "--json"
    )
    assert json.loads(answer.out)["samples"] == {"test": 18, "val": 2}
    assert cli("init", "mine.yaml", "--data", "my_data", "--model", "tiny.json").code == 0
    study = load_study("mine.yaml").resolved()
    assert (study.name, study.evaluation.split, study.roles.adaptation, study.roles.held_out) == ("mine", "val", ("signals",), ("other",))  # fmt: skip
    planned = json.loads(cli("plan", "mine.yaml", "--json").out)
    assert planned["steps"]["train"]["unique"] > 0 and planned["missing"] == []


def test_study_of_a_root_takes_the_roles_of_its_suite(desk: Path, cli: Any) -> None:
    cli("import-data", "signals", "--out", "my_data")
    cli("import-data", "signals", "--out", "my_data", "--name", "other", "--role", "held_out")
    text = "name: s\nmodel: {config: tiny.json}\ndata: {root: my_data}\nbudget: {steps_per_task: 1}\ngrid: {strategies: [zero_shot]}\n"
    Path("s.yaml").write_text(text)
    roles = load_study("s.yaml").resolved().roles
    assert (roles.adaptation, roles.held_out, roles.pretraining) == (("signals",), ("other",), ())
    stated = load_study("s.yaml", ["data.held_out=[]"]).resolved().roles
    assert stated.held_out == (), "what the study says comes first"


def test_init_refuses_what_would_make_no_study_and_replaces_nothing(desk: Path, cli: Any) -> None:
    refused(
        cli("init", "a.yaml", "--data", "nowhere", "--model", "tiny.json"),
        "nowhere does not exist",
        "import-data",
    )
    Path("empty").mkdir()
    refused(
        cli("init", "a.yaml", "--data", "empty", "--model", "tiny.json"), "no dataset to learn", "import-data"
    )
    cli("import-data", "signals", "--out", "my_data")
    refused(
        cli("init", "a.yaml", "--data", "my_data", "--model", "ViT-B-23"), "ViT-B-23", "did you mean ViT-B-32"
    )
    assert not Path("a.yaml").exists()
    Path("a.yaml").write_text("mine")
    line = ["init", "a.yaml", "--data", "my_data", "--model", "tiny.json"]
    refused(cli(*line), "a.yaml is there already", "--force")
    assert Path("a.yaml").read_text() == "mine"
    assert cli(*line, "--force").code == 0 and load_study("a.yaml").name == "a"


def test_single_dataset_of_many_classes_is_cut_into_tasks(desk: Path, cli: Any) -> None:
    for number in range(6):
        for at in range(4):
            place = Path("kinds") / f"kind {number}" / f"{at}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (40 * number, at, 0)).save(place)
    cli("import-data", "kinds", "--out", "my_data")
    cli("init", "mine.yaml", "--data", "my_data", "--model", "tiny.json")
    assert load_study("mine.yaml").stream.chunks == 3
    assert cli("plan", "mine.yaml").code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--val", "2"], "--val 2 must be a share"),
        (["--val", "0.5", "--test", "0.6"], "more than the whole"),
        (["--role", "task"], "--role task: there is no such role"),
        (["--template", "a photo"], "must hold {c}"),
        (["--equal", "keep"], "--equal keep: choose refuse or drop"),
        (["--name", "../up"], "is not a valid dataset name"),
        (["--test", "0"], "needs samples for test"),
    ],
)
def test_import_refuses_options_that_make_no_sense_and_writes_nothing(desk: Path, cli: Any, words: list[str], said: str) -> None:  # fmt: skip
    answer = cli("import-data", "signals", "--out", "my_data", *words)
    assert answer.code == 2 and said in answer.err
    assert not Path("my_data").exists()


# --- a technique ------------------------------------------------------------------------------------------------------


def test_technique_of_a_module_file_is_listed_merges_and_is_named_by_its_source(desk: Path, cli: Any) -> None:
    refused(cli("techniques", "halved"), "unknown technique 'halved'")
    told = cli("techniques", "halved", "--module", "my_own.py")
    source = hashlib.sha256(MODULE.encode()).hexdigest()
    assert told.code == 0 and f"written in: my_own (sha256 {source})" in told.out
    line = ["merge", "--technique", "halved", "--module", "my_own.py", "--base", "base.safetensors"]
    answer = cli(*line, "--out", "m.safetensors", "one.safetensors", "two.safetensors")
    assert answer.code == 0, answer.err
    base, one, two = (load_file(f"{name}.safetensors")["w"] for name in ("base", "one", "two"))
    np.testing.assert_allclose(
        load_file("m.safetensors")["w"], base + ((one - base) + (two - base)) / 4, rtol=1e-6
    )
    assert source in Path("m.safetensors").read_bytes().decode("latin-1")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("nothing.py", "x = 1\n", ["declares no technique", "@technique"]),
        (
            "broken.py",
            "import temporal_merge\n\n1 / 0\n",
            ["broken.py, line 3 cannot be run", "ZeroDivisionError"],
        ),
        ("unwritten.py", "def (:\n", ["unwritten.py, line 1 cannot be run", "SyntaxError"]),
        ("json.py", MODULE, ["another module json", "rename the file"]),
        ("same.py", MODULE.replace("halved", "ties"), ["there is a technique 'ties' already"]),
        ("my.yaml", MODULE, ["is no module"]),
    ],
)
def test_module_that_cannot_be_used_is_refused_with_the_reason(desk: Path, cli: Any, name: str, text: str, says: list[str]) -> None:  # fmt: skip
    Path(name).write_text(text)
    answer = cli("techniques", "--module", name)
    assert answer.code == 2 and answer.out == ""
    assert all(word in answer.err for word in says), answer.err
    refused(cli("techniques", "--module", "absent.py"), "absent.py is no module")


def test_worker_that_cannot_import_the_module_loads_the_file_and_only_of_the_same_source(desk: Path) -> None:
    file = str(desk / "my_own.py")
    source = hashlib.sha256(MODULE.encode()).hexdigest()
    own.load("halved", Origin("my_own", source, file))
    assert registry.get("halved").origin == Origin("my_own", source)
    with pytest.raises(TechniqueError, match="install one version on every node"):
        own.load("halved", Origin("my_own", "0" * 64, file))


@pytest.mark.ray
@pytest.mark.slow
def test_study_runs_with_a_module_file_and_its_merges_depend_on_the_source(
    world: World, cluster: Cluster, desk: Path, cli: Any
) -> None:
    strategy = {"init": "base", "deploy": "all", "technique": "halved"}
    study = world.study(grid={"strategies": [strategy]}, stream={"tasks": ["red", "green"]})
    refused(cli("plan", study), "unknown technique 'halved'")
    line = ["run", study, "--out", desk / "out", "--module", desk / "my_own.py", "--address", cluster.address]
    answer = command(*line, cwd=desk.parent)
    assert answer.returncode == 0, answer.stderr
    (desk / "my_own.py").write_text(MODULE.replace("/ 2\n", "/ 2.0\n"))
    steps = json.loads(
        cli("plan", study, "--out", desk / "out", "--module", desk / "my_own.py", "--json").out
    )["steps"]
    assert (steps["train"]["cached"], steps["merge"]["cached"]) == (steps["train"]["unique"], 0)
