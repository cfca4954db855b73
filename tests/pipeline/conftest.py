"""Studies with a tracking store of their own."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking.mlflow.local import LOCAL_DB
from tests.pipeline.tracked_study import Tracked, finished_study


@pytest.fixture
def make_study(tmp_path: Path, empty_store: Path) -> Callable[..., Tracked]:
    def make(name: str, **options: Any) -> Tracked:
        study = finished_study(tmp_path / name, **{"strategies": ("zero_shot", "best_in_time"), **options})
        shutil.copyfile(empty_store, study.out / LOCAL_DB)
        return study

    return make
