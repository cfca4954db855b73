"""The page of a report in a real browser: every figure is drawn, filters work, nothing is loaded from anywhere."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.report.build import write_report
from tests.pipeline.report_toys import FULL, PAIRS, invented, toy
from tests.ui.conftest import WIDTH

if TYPE_CHECKING:
    from playwright.sync_api import Page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    plan = toy({**FULL, "seed": [0]})
    written = write_report(out, plan, invented(plan), lambda best: PAIRS)
    return Path(written["html"])


def drawn(page: "Page") -> dict[str, int]:
    """The marks of every figure that a person sees: paths and texts of its data, not of axes or legends."""
    return page.eval_on_selector_all(
        "section:has(.chart)",
        """sections => Object.fromEntries(sections.map(section => [section.id,
            section.querySelectorAll('.mark-group .mark-group.role-frame, [class*="role-mark"] > *').length]))""",
    )


def test_page_draws_every_figure_and_fits_the_window(report: Path, page: "Page") -> None:
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(report.as_uri())
    page.wait_for_selector("body[data-drawn]")
    marks = drawn(page)
    assert len(marks) == 9 and all(marks.values()), marks
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTH
    assert page.locator(".advice").inner_text().startswith("Deploy ")


def test_filter_leaves_only_what_was_asked_for(report: Path, page: "Page") -> None:
    page.goto(report.as_uri())
    page.wait_for_selector("body[data-drawn]")
    before = page.locator("#techniques .mark-rect.role-mark path").count()
    page.select_option("#only_technique", "ties")
    page.wait_for_function(
        "n => document.querySelectorAll('#techniques .mark-rect.role-mark path').length < n", arg=before
    )
    assert page.locator("#techniques .mark-rect.role-mark path").count() > 0
    page.select_option("#only_technique", "all")
    page.wait_for_function(
        "n => document.querySelectorAll('#techniques .mark-rect.role-mark path').length === n", arg=before
    )


def test_figure_without_rows_counts_as_empty(report: Path, page: "Page") -> None:
    page.goto(report.as_uri())
    page.wait_for_selector("body[data-drawn]")
    assert drawn(page)["techniques"] > 0
    page.evaluate("choose('technique', 'nothing')")
    page.wait_for_function(
        "() => document.querySelectorAll('#techniques .mark-rect.role-mark path').length === 0"
    )
    assert drawn(page)["techniques"] == 0


def test_drop_down_shows_another_trajectorys_matrix(report: Path, page: "Page") -> None:
    page.goto(report.as_uri())
    page.wait_for_selector("body[data-drawn]")
    before = page.locator("#matrix .mark-text text").all_inner_texts()
    page.select_option("#matrix select", "zero_shot")
    page.wait_for_function(
        "old => JSON.stringify([...document.querySelectorAll('#matrix .mark-text text')].map(e => e.textContent)) !== old",
        arg=json.dumps(before, separators=(",", ":")),
    )
