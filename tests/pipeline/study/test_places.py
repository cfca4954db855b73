"""Paths with variables and home directories: replaced when a study is read, or named in an error."""

from pathlib import Path

import pytest
import yaml

from merge_service.errors import UserError
from pipeline.cli.app import _written_out
from pipeline.errors import ConfigError
from pipeline.study.config import load_study, study_from
from tests.pipeline.plan_toys import raw_study


@pytest.fixture
def at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "/somewhere")
    monkeypatch.delenv("NOT_THERE", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value", "becomes"),
    [
        ("data.root", "~/data", "{home}/data"),
        ("data.root", "~", "{home}"),
        ("data.cache", "${PLACE}/x", "/somewhere/x"),
        ("data.root", "$PLACE/x/$PLACE", "/somewhere/x//somewhere"),
        ("model.config", "local-dir:~/clip", "local-dir:{home}/clip"),
        ("model.pretrained", "${PLACE}/clip.safetensors", "/somewhere/clip.safetensors"),
        ("stream.file", "~/stream.json", "{home}/stream.json"),
        ("storage.store", "${PLACE}/store", "/somewhere/store"),
        ("tracking.uri", "sqlite:///${PLACE}/mlflow.db", "sqlite:////somewhere/mlflow.db"),
        ("data.suite", "${PLACE}/suite.yaml", "/somewhere/suite.yaml"),
    ],
)
def test_path_of_a_study_is_written_out(at_home: Path, key: str, value: str, becomes: str) -> None:
    raw = raw_study(["zero_shot"])
    section, name = key.split(".")
    raw.setdefault(section, {})[name] = value
    if key == "stream.file":
        raw["stream"] = {"file": value}
    found = study_from(raw).model_dump()
    assert found[section][name] == becomes.format(home=at_home)


def test_path_of_an_override_and_of_an_axis_is_written_out(at_home: Path) -> None:
    study = study_from(raw_study(["zero_shot"]), "f", ["data.root=~/x", "grid.model.config=[$PLACE/a,~/b]"])
    assert study.data.root == f"{at_home}/x"
    assert [cell.model.config for cell in study.cells] == ["/somewhere/a", f"{at_home}/b"]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("${NOT_THERE}/x", "the environment variable NOT_THERE is not set"),
        ("$NOT_THERE/x", "the environment variable NOT_THERE is not set"),
        ("${oc.env:HOME}/x", "is not the name of an environment variable"),
        ("${HOME:-/tmp}/x", "is not the name of an environment variable"),
        ("~nobody-of-that-name/x", "home directory that this machine does not know"),
    ],
)
def test_path_that_cannot_be_written_out_is_named(at_home: Path, value: str, says: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.root") as caught:
        study_from(raw_study(["zero_shot"]), "f", [f"data.root='{value}'"])
    assert says in str(caught.value)


@pytest.mark.parametrize("text", ["data: {root: ${PLACE}/x}", "data: {a: 1,\n  root: ${PLACE}/x, b: 2}"])
def test_variable_that_yaml_takes_for_braces_is_pointed_out(at_home: Path, text: str) -> None:
    file = at_home / "study.yaml"
    file.write_text(f"name: x\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        load_study(file)
    assert 'environment variable into quotes: "${PLACE}/x"' in str(caught.value)


def test_arguments_that_the_shell_left_are_written_out_and_overrides_are_not(at_home: Path) -> None:
    given = [
        "plan",
        "~/s.yaml",
        "--out=~/x",
        "--out",
        "$PLACE/y",
        "--set",
        "data.root=~/d",
        "--set=a=$PLACE",
        "--json",
    ]
    assert _written_out(given) == [
        "plan", f"{at_home}/s.yaml", f"--out={at_home}/x", "--out", "/somewhere/y", "--set", "data.root=~/d", "--set=a=$PLACE", "--json",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"--out: .* NOT_THERE is not set"):
        _written_out(["run", "--out=${NOT_THERE}/x"])


def test_study_sent_to_a_cluster_has_its_paths_written_out(at_home: Path) -> None:
    from pipeline.run.submit import _written_out as sent

    file = at_home / "study.yaml"
    for root, override, written in (
        ("/plain", "data.cache=/c", False),
        ("~/d", "data.cache=/c", True),
        ("/plain", "data.cache=$PLACE", True),
    ):
        raw = raw_study(["zero_shot"])
        raw["data"]["root"] = root
        file.write_text(yaml.safe_dump(raw))
        study = load_study(file, [override])
        text = sent(study, file, [override])
        assert (text is not None) == written
        if text is not None:
            file.write_text(text)
            assert load_study(file) == study and "~/" not in text and "$" not in text


def test_file_of_a_technique_of_ones_own_is_written_out(at_home: Path) -> None:
    raw = raw_study([{"init": "base", "deploy": "all", "technique": "~/nothing-there.py:blend"}])
    with pytest.raises(ConfigError, match=str(at_home / "nothing-there.py")):
        study_from(raw)
