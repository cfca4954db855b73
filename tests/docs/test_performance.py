"""Every measured figure on a page is in the committed results."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.world import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import page
from record import RESULTS

FILES = sorted(RESULTS.rglob("*.json"))
COUNTED = ("248", "284", "1,488", "5.2", "32 MiB")
"""What is counted, not measured: other tests hold the plan of the sweep to its numbers, and code states the other."""
NAMES = re.compile(
    r"`[^`]*`|\]\([^)]*\)|ViT-[BL]/\d+|clip_benchmark|[A-Za-z][\w-]*\d[\w.]*|\b[a-z]+_\d+\b|OPENBLAS|^```.*?^```",
    re.DOTALL | re.MULTILINE,
)
"""Digits that measure nothing: of names, code and commands."""


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(RESULTS)))
def test_result_says_what_was_measured_where_and_of_which_commit(file: Path) -> None:
    found = json.loads(file.read_text())
    assert re.fullmatch(r"[0-9a-f]{40}", found["commit"])
    assert (ROOT / "benchmarks" / f"{found['benchmark']}.py").is_file()
    assert {"python", "temporal-merge", "torch", "numpy"} <= found["versions"].keys()
    assert {"cpu", "cores", "cores_used_by_others", "shared_with_other_work"} <= found["machine"].keys()
    assert found["settings"] and found["found"]


@pytest.mark.parametrize("path", page.PAGES, ids=lambda path: path.name)
def test_figures_of_a_page_are_those_of_the_results(path: Path) -> None:
    assert path.read_text() == page.written(path.read_text()), "python benchmarks/page.py writes it anew"


def test_figure_that_is_changed_by_hand_is_found() -> None:
    text = page.PAGE.read_text()
    start = re.search(r"<!-- figures: [\w-]+ -->\n.*?\d", text, re.DOTALL)
    assert start
    digit = text[start.end() - 1]
    forged = text[: start.end() - 1] + str((int(digit) + 1) % 10) + text[start.end() :]
    assert forged != page.written(forged) == text


def test_page_states_no_number_outside_of_the_blocks() -> None:
    by_hand = page.BLOCK.sub("", page.PAGE.read_text())
    for number in COUNTED:
        by_hand = re.sub(rf"\s{re.escape(number)}\b", "", by_hand)
    assert [line for line in NAMES.sub("", by_hand).splitlines() if re.search(r"\d", line)] == []


def test_every_block_is_on_one_page_once() -> None:
    found = [name for path in page.PAGES for _, name, _ in page.BLOCK.findall(path.read_text())]
    assert sorted(found) == sorted(page.BLOCKS)
