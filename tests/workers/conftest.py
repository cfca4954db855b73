"""Shared fixtures of the tests of the workers."""

from pathlib import Path

import pytest

from tests.workers.model_helpers import Toys, make_toys


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    return make_toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "expert"
