"""Fixtures of tests that write thousands of tiny files."""

import pytest


@pytest.fixture
def no_disk_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip syncing after each file, which would take minutes and prove nothing."""
    monkeypatch.setattr("os.fsync", lambda handle: None)
