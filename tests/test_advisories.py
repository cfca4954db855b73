"""The version bounds of setup.cfg must exclude every advisory that SECURITY.md names."""

import configparser
import re

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.world import ROOT

ROWS = re.findall(
    r"^\| ([\w-]+) \| (CVE-\d+-\d+) \| [^|]+ \| ([\d.]+) \|", (ROOT / "SECURITY.md").read_text(), re.MULTILINE
)


def _bounds() -> dict[str, Requirement]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    found = (Requirement(line) for line in config["options"]["install_requires"].split("\n") if line.strip())
    return {one.name: one for one in found}


@pytest.mark.parametrize(("package", "advisory", "mended"), ROWS, ids=[row[1] for row in ROWS])
def test_bounds_exclude_every_version_with_a_known_advisory(package: str, advisory: str, mended: str) -> None:
    lowest = [
        Version(one.version) for one in _bounds()[package].specifier if one.operator in (">=", "==", "~=")
    ]
    assert lowest and min(lowest) >= Version(mended), (
        f"{package} {lowest} lets {advisory} in (mended in {mended})"
    )


def test_every_advisory_row_was_read() -> None:
    assert len(ROWS) == (ROOT / "SECURITY.md").read_text().count("| CVE-") > 10
