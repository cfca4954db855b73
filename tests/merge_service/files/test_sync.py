"""Everything that writes files syncs their names; only file systems that cannot sync directories are exempt."""

import errno
import os
from pathlib import Path

import pytest

from merge_service.files import sync_directory
from tests.merge_service.toys import save, vector


def failing(number: int) -> object:
    """An fsync that works on files and fails on directories."""
    sync = os.fsync

    def fsync(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):  # noqa: PTH112
            raise OSError(number, os.strerror(number))
        sync(handle)

    return fsync


def test_file_system_that_cannot_sync_a_directory_is_excused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    sync_directory(tmp_path)
    assert save(tmp_path / "one.safetensors", {"w": vector([1])}).is_file()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_directory_that_fails_to_sync_is_an_error_of_whoever_writes(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    for write in (
        lambda: sync_directory(tmp_path),
        lambda: save(tmp_path / "one.safetensors", {"w": vector([1])}),
    ):
        with pytest.raises(OSError) as caught:
            write()
        assert caught.value.errno == number
