"""Merge tests write thousands of tiny files; syncing each to disk would take minutes and test nothing."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def no_disk_sync() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield
