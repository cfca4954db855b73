"""Small files are replaced whole: durable in the right order, and nothing is left of an attempt that fails."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from merge_service.files import prepared, replace_whole


def test_file_is_on_disk_before_it_has_its_name_and_the_name_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "state.json", list[str]()
    path.write_text("old")
    real = os.fsync

    def noted(handle: int) -> None:
        seen.append(
            ("directory" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file") + f" {path.read_text()}"
        )
        real(handle)

    monkeypatch.setattr(os, "fsync", noted)
    replace_whole(path, iter(["n", "ew ü"]), mode=0o600)
    assert seen == ["file old", "directory new ü"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    seen.clear()
    replace_whole(path, b"quick", sync=False)
    assert seen == [] and path.read_bytes() == b"quick" and list(tmp_path.iterdir()) == [path]


def test_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")

    def pieces() -> Iterator[str]:
        yield "half"
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        replace_whole(path, pieces())
    with prepared(path, "not wanted") as made:
        assert made.read_text() == "not wanted"
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
