"""Tracking stores that cost something to make."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking_local import LOCAL_DB, make_local_store
from tests.pipeline.tracked_study import Tracked, finished_study


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty tracking store: making one takes seconds, so tests copy it."""
    home = tmp_path_factory.mktemp("mlflow")
    make_local_store(home)
    return home / LOCAL_DB


@pytest.fixture
def make_study(tmp_path: Path, empty_store: Path) -> Callable[..., Tracked]:
    def make(name: str, **options: Any) -> Tracked:
        study = finished_study(tmp_path / name, **{"strategies": ("zero_shot", "best_in_time"), **options})
        shutil.copyfile(empty_store, study.out / LOCAL_DB)
        return study

    return make
