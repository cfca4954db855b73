"""Import paths of earlier versions: scripts of other people that name them go on working."""

import importlib
import subprocess
import sys
import warnings

import pytest

from merge_service.moved import FOLDERS, moves
from tests.world import ROOT

NAMES = {
    "pipeline.store": "Store", "pipeline.plan": "make_plan", "pipeline.results": "results", "pipeline.workspace": "Workspace",
    "pipeline.tracking": "Tracker sync", "merge_service.techniques": "Technique get", "merge_service.service": "MergeService",
    "workers.engine": "make_engine join_group leave_group TorchEngine",
}  # fmt: skip


@pytest.mark.parametrize("old", sorted(moves()))
def test_old_path_gives_the_module_that_stands_elsewhere_now_and_warns(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=old.replace(".", r"\.")):
        found = importlib.import_module(old)
    assert found is importlib.import_module(moves()[old])


@pytest.mark.parametrize("package", sorted(NAMES))
def test_package_still_gives_the_names_of_the_module_it_was(package: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert all(hasattr(importlib.import_module(package), name) for name in NAMES[package].split())
    with pytest.raises(AttributeError):
        importlib.import_module(package).no_such_name  # noqa: B018


def test_nothing_of_this_project_uses_an_old_path() -> None:
    code = "import sys, temporal_merge, pipeline.cli.app, workers.actors, pipeline.run.driver; print([m for m in sys.argv[1:] if m in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:importlib", "-c", code, *moves()],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert answer.stdout.strip() == "[]", answer.stderr
    assert set(FOLDERS) == {"merge_service", "pipeline", "workers"}
