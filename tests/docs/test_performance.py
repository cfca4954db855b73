"""No page states a measured figure that the committed results do not hold."""

import json
import re
import sys
from pathlib import Path

import pytest

from merge_service import techniques
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


def test_pages_count_the_techniques_that_stream_and_the_bytes_of_their_states() -> None:
    files = [json.loads(path.read_text()) for path in RESULTS.glob("arrivals-*.json")]
    found = {name: of for file in files for name, of in file["found"].items()}
    streaming = [name for name in techniques.names() if "stream" in techniques.get(name).forms]
    assert found and set(found) <= set(streaming)
    readme, merging = (
        " ".join(path.read_text().split()) for path in (ROOT / "README.md", ROOT / "docs" / "merging.md")
    )
    assert f"{len(streaming)} of the {len(techniques.names())} techniques" in readme
    checkpoint = files[0]["settings"]["checkpoint_bytes"]
    state = [4 * (of["early"]["read"][0] - 2 * checkpoint) / checkpoint for of in found.values()]
    assert f"{min(state):.0f} to {max(state):.0f} bytes per parameter of a float32 base" in merging
