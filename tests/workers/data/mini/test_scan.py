"""The scan finds pictures that written splits share; the shipped suite has none."""

import json
from pathlib import Path

import numpy as np
import pytest

from merge_service.errors import UserError
from tests.workers.data.mini.test_alike import close_to, picture
from workers.data.mini.__main__ import main
from workers.data.mini.scan import Pair, scan, table
from workers.data.writer import Sample, write_dataset

RADIUS = 0.95


def write(root: Path, **datasets: dict[str, list[np.ndarray]]) -> Path:
    for name, splits in datasets.items():
        samples = {split: [Sample(image, 0) for image in images] for split, images in splits.items()}
        write_dataset(root / name, kind="classification", classes=["a"], templates=["{c}"], splits=samples)
    roles = {"pretraining": [], "adaptation": list(datasets), "held_out": []}
    body = {"name": "toy", "roles": roles, "alike": dict.fromkeys(datasets, RADIUS)}
    (root / "suite.json").write_text(json.dumps(body))
    return root


def shared(pairs: list[Pair]) -> dict[tuple[tuple[str, str], tuple[str, str]], tuple[int, int]]:
    return {(p.left, p.right): (p.equal, p.near) for p in pairs if p.equal or p.near}


def test_clean_suite_shares_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, one={"train": [picture(1), picture(2)], "val": [picture(3)], "test": [picture(4)]})
    assert not shared(scan(tmp_path))
    assert main(["--scan", "--root", str(tmp_path)]) == 0
    assert "| one | 0 | 0 | 0 | 0.0 %, at most" in capsys.readouterr().out


def test_equal_and_alike_pictures_are_found_across_splits_and_sets(tmp_path: Path) -> None:
    write(
        tmp_path,
        one={"train": [picture(1), picture(2)], "val": [picture(3)], "test": [close_to(2), picture(4)]},
        two={"train": [picture(5), picture(4)], "test": [close_to(3)]},
    )
    assert shared(scan(tmp_path)) == {
        (("one", "train"), ("one", "test")): (0, 1),
        (("one", "test"), ("two", "train")): (1, 1),
        (("one", "val"), ("two", "test")): (0, 1),
    }
    assert main(["--scan", "--root", str(tmp_path)]) == 1


def test_copies_within_a_split_are_counted(tmp_path: Path) -> None:
    write(tmp_path, one={"train": [picture(1), picture(2), picture(1)], "test": [picture(3)]})
    assert shared(scan(tmp_path)) == {(("one", "train"), ("one", "train")): (1, 0)}
    assert main(["--scan", "--root", str(tmp_path)]) == 1


def test_rate_is_a_share_of_the_pictures_of_the_later_split(tmp_path: Path) -> None:
    write(tmp_path, one={"train": [picture(1)], "test": [close_to(1), picture(2), picture(3), picture(4)]})
    assert "| one | 0 | 0 | 1 | 25.0 %, at most 0.9" in table(scan(tmp_path))


def test_suite_without_radii_is_refused(tmp_path: Path) -> None:
    write(tmp_path, one={"train": [picture(1)]})
    body = json.loads((tmp_path / "suite.json").read_text())
    del body["alike"]
    (tmp_path / "suite.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match="has no `alike`"):
        scan(tmp_path)
