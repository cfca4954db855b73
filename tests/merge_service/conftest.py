"""Merge tests write thousands of tiny files; waiting for the disk after each would take minutes and prove nothing."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def no_disk_sync() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield
