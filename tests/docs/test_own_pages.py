"""Pages that start from an empty folder: their blocks run as written, one after the other."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.api import open_run
from tests.docs.test_docs import IN_ORDER, blocks, commands, ours
from tests.world import ROOT, Cluster


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("page", IN_ORDER)
def test_page_runs_as_it_is_written_from_an_empty_folder(
    page: str, tmp_path: Path, cluster: Cluster, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in [one for one in blocks("python", "sh") if one.page == ROOT / "docs" / page]:
        if block.kind == "python":
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            subprocess.run([sys.executable, "-c", block.text], check=True, env=environment)
            continue
        for words in commands(block):
            arguments = ours(words)
            assert arguments is not None, f"{block}: {words[0]} is not ours"
            elsewhere = ["--address", cluster.address] if arguments[0] == "run" else []
            answer = cli(*arguments, *elsewhere)
            assert answer.code == 0, f"{block}: {answer.err}"
    run = open_run("runs/mine")
    assert run.results["complete"] and (tmp_path / "runs" / "mine" / "report" / "report.html").is_file()
    learnt = run.frame().query("trajectory == 'continual_finetuning'")
    assert learnt.ka.iloc[-1] > learnt.ka.iloc[0]


@pytest.mark.ray
@pytest.mark.slow
def test_notebook_runs_cell_by_cell_from_an_empty_folder(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cells = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in [one for one in cells if one["cell_type"] == "code"]:
        assert cell["outputs"] == [], "outputs are made, not kept"
        text = "".join(cell["source"]).replace("tm.run(study)", f"tm.run(study, address={cluster.address!r})")
        exec(compile(text, "notebook", "exec"), names)
    run = names["run"]
    assert run.results["complete"] and run.verify() == []
    assert "best_in_time" in run._repr_html_()


@pytest.mark.slow
def test_package_of_a_technique_installs_as_written_and_every_command_knows_it(tmp_path: Path) -> None:
    """The two files of docs/technique.md, and `pip install .` without a network."""
    package, place = tmp_path / "package", tmp_path / "site"
    package.mkdir()
    for block in [one for one in blocks("python", "text") if one.page == ROOT / "docs" / "technique.md"]:
        if name := re.match(r"# (clipped\.py|pyproject\.toml)\n", block.text):
            (package / name[1]).write_text(block.text)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*pip, "--disable-pip-version-check", "--target", str(place), str(package)], check=True)
    environment = {**os.environ, "PYTHONPATH": f"{place}:{ROOT}"}
    line = [sys.executable, "-m", "pipeline.cli", "techniques", "clipped_mean"]
    answer = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "written in: clipped (sha256 " in answer.stdout
