"""The suite as it is shipped, written once for all tests of this file (a minute on one core)."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from workers.data.manifest import describe
from workers.data.mini import suite as mini
from workers.data.mini.packages import versions
from workers.data.mini.scan import scan, table

DIGESTS = Path(__file__).parent / "digests.json"
"""{"made_with": versions of what draws the pictures, "digests": {dataset: what `describe` says}}; `python -m` this file writes it anew."""
DOCS = Path(__file__).parents[4] / "docs" / "data.md"


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shipped = Path(__file__).parents[4] / "data" / "mini"
    if mini.is_current(shipped):
        return shipped
    root = tmp_path_factory.mktemp("suite") / "mini"
    mini.build(root)
    return root


def found(root: Path) -> dict[str, dict[str, str]]:
    digests = {name: describe(root, name).digest for name in mini.MAKERS}
    return {"made_with": versions() | {"pillow": version("pillow")}, "digests": digests}


def test_no_picture_and_none_like_it_is_in_two_splits_or_sets(suite: Path) -> None:
    pairs = scan(suite)
    assert len(pairs) == 35 * 36 / 2, (
        "12 sets of three splits, one of which has two: all pairs and each by itself"
    )
    assert not [pair for pair in pairs if pair.equal or pair.near]
    assert table(pairs) in DOCS.read_text(encoding="utf-8"), "docs/data.md states other numbers than --scan"


def test_sizes_are_those_that_the_documentation_states(suite: Path) -> None:
    page = DOCS.read_text(encoding="utf-8")
    for name in mini.MAKERS:
        info = describe(suite, name)
        sizes = [
            str(info.splits[split].samples) if split in info.splits else "-"
            for split in ("train", "val", "test")
        ]
        row = next(line for line in page.splitlines() if line.startswith(f"| {name} | "))
        assert f" | {' | '.join(sizes)} | " in row, name
        assert info.kind == "retrieval" or f"| {len(info.classes)} | " in row, name
    total = sum(path.stat().st_size for path in suite.rglob("*.tar"))
    assert total < 100e6


def test_pictures_have_the_bytes_that_are_pinned(suite: Path) -> None:
    pinned, here = json.loads(DIGESTS.read_text()), found(suite)
    if pinned["made_with"] != here["made_with"]:
        pytest.skip(f"drawn with {here['made_with']}, the pins with {pinned['made_with']}")
    assert here["digests"] == pinned["digests"]


if __name__ == "__main__":
    DIGESTS.write_text(json.dumps(found(Path("data/mini")), indent=1) + "\n")
