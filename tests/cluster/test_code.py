"""Whose code a worker imports when files of the same names come first on its import path."""

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.code import PACKAGES
from tests.world import ROOT

SHADOW = "raise SystemExit('a file of the current directory was imported')\n"

WORKER = """
import pickle, sys
from ray import cloudpickle
prepare = cloudpickle.loads(open({pickled!r}, "rb").read())
assert not set({packages}) & set(sys.modules), "the function brings our modules along"
prepare()
prepare()
sys.path.insert(0, {here!r})  # as Ray does with its driver's current directory
import cluster.pool, merge_service.merge, pipeline.store.local, workers.actors, temporal_merge
import filecmp, safetensors
import my_technique
print(workers.actors.__file__)
"""


def _files(here: Path) -> None:
    for name in (*PACKAGES, "temporal_merge", "safetensors", "filecmp"):
        (here / f"{name}.py").write_text(SHADOW)


def _folders(here: Path) -> None:
    for name in (*PACKAGES, "temporal_merge", "safetensors", "filecmp"):
        (here / name).mkdir()
        (here / name / "__init__.py").write_text(SHADOW)


@pytest.mark.fault("F28")
@pytest.mark.parametrize("shadow", [_files, _folders])
@pytest.mark.parametrize("given", [True, False], ids=["root given", "root found"])
@pytest.mark.parametrize("on_path", [True, False], ids=["on PYTHONPATH too", "in the current directory"])
def test_worker_imports_our_code_whatever_lies_in_the_current_directory(
    shadow: object, given: bool, on_path: bool, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    shadow(here)  # type: ignore[operator]
    (here / "my_technique.py").write_text("")
    pickled = tmp_path / "hook"
    make = f"from ray import cloudpickle; from cluster.code import own_code_first; open({str(pickled)!r}, 'wb').write(cloudpickle.dumps(own_code_first({str(ROOT) if given else None!r}, keep_path=True)))"
    subprocess.run([sys.executable, "-c", make], cwd=ROOT, check=True)
    if on_path:  # PYTHONPATH comes before installed packages, except for our own
        for name in ("safetensors", "filecmp"):
            _remove(here / name)
    path = f"{here}:{ROOT}" if on_path else str(ROOT)
    answer = subprocess.run(
        [sys.executable, "-P", "-c", WORKER.format(pickled=str(pickled), packages=PACKAGES, here=str(here))],
        cwd=here, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == str(ROOT / "workers" / "actors.py")


def _remove(place: Path) -> None:
    place.with_suffix(".py").unlink(missing_ok=True)
    if place.is_dir():
        (place / "__init__.py").unlink()


def test_command_runs_our_code_whatever_lies_on_pythonpath(tmp_path: Path) -> None:
    _files(tmp_path)
    for name in ("safetensors", "filecmp"):
        _remove(tmp_path / name)
    start = f"import sys; sys.path.append({str(ROOT)!r}); from temporal_merge_command import main; main()"
    answer = subprocess.run(
        [sys.executable, "-P", "-c", start, "techniques", "ties"], cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert answer.returncode == 0 and "ties" in answer.stdout, answer.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_program_with_a_module_of_the_name_of_ours_is_told_which_file_it_is(
    package: str, tmp_path: Path
) -> None:
    (tmp_path / f"{package}.py").write_text("")
    program = f"import sys; sys.path.append({str(ROOT)!r}); import temporal_merge; temporal_merge.run"
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )  # fmt: skip
    assert (
        answer.returncode == 1 and f"finds {tmp_path}/{package}.py by that name; rename it" in answer.stderr
    )
