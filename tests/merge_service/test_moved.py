"""Import paths of earlier versions: users' scripts that use them continue to work."""

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from merge_service.merge import merge
from merge_service.moved import FOLDERS, moves
from tests.merge_service.toys import save
from tests.world import ROOT

NAMES = {
    "pipeline.store": "Store", "pipeline.plan": "make_plan", "pipeline.results": "results", "pipeline.workspace": "Workspace",
    "pipeline.tracking": "Tracker sync", "merge_service.techniques": "Technique get", "merge_service.service": "MergeService",
    "workers.pretrain": "pretrain count_weights", "workers.data.mini": "build is_current MAKERS",
    "workers.engine": "make_engine join_group leave_group TorchEngine",
}  # fmt: skip


@pytest.mark.parametrize("old", sorted(moves()))
def test_old_path_gives_the_module_that_stands_elsewhere_now_and_warns(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=old.replace(".", r"\.")):
        found = importlib.import_module(old)
    new = [importlib.import_module(one) for one in moves()[old]]
    if len(new) == 1:
        assert found is new[0]
    else:
        assert all(getattr(found, name) is not None for one in new for name in vars(one) if name[0] != "_")


@pytest.mark.parametrize("package", sorted(NAMES))
def test_package_still_gives_the_names_of_the_module_it_was(package: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert all(hasattr(importlib.import_module(package), name) for name in NAMES[package].split())
    with pytest.raises(AttributeError):
        importlib.import_module(package).no_such_name  # noqa: B018


def test_keyword_of_an_earlier_version_is_taken_by_its_new_name_and_warns(tmp_path: Path) -> None:
    base, expert = (
        save(
            tmp_path / f"{number}.safetensors", {"w": np.arange(4 * number, 4 * number + 4, dtype=np.float32)}
        )
        for number in range(2)
    )
    with pytest.warns(DeprecationWarning, match="keep_limits is called keep_thresholds"):
        merge("ties", {}, base, [expert], tmp_path / "out.safetensors", keep_limits=tmp_path)
    assert len(list(tmp_path.glob("*.limits.json"))) == 1


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
