"""The page of a report in a real browser: every figure is drawn, filters work, nothing is loaded from elsewhere."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.report import build
from pipeline.report.build import write_report
from tests.pipeline.report_toys import PAIRS, studied, toy
from tests.ui.conftest import HEIGHT, WIDTH

if TYPE_CHECKING:
    from playwright.sync_api import Page

MERGED = {"init": ["base", "ema"], "deploy": ["all", "ema"], "technique": ["average", "ties"]}
GRID: dict[str, Any] = {
    "strategies": ["zero_shot", "multitask", MERGED],
    "seed": [0, 1],
    "budget.multiplier": [1, 2],
}
NARROW = 800
SCORED = (
    "#standings tbody tr:not([hidden])",
    "rows => rows.map(row => [row.dataset.group, row.querySelector('[data-metric=gm]').textContent])",
)
CELLS = "#techniques .mark-rect.role-mark path"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "compare", lambda *_: PAIRS)
        return Path(write_report([studied(out, toy(GRID))])["html"])


@pytest.fixture
def opened(report: Path, page: "Page") -> "Page":
    page.goto(report.as_uri())
    page.wait_for_selector("body[data-drawn]")
    return page


def drawn(page: "Page") -> dict[str, int]:
    """The visible marks of every figure: paths and texts of its data, not of axes or legends."""
    return page.eval_on_selector_all(
        "section:has(.chart)",
        """sections => Object.fromEntries(sections.map(section => [section.id,
            section.querySelectorAll('.mark-group .mark-group.role-frame, [class*="role-mark"] > *').length]))""",
    )


def rows_shown(page: "Page") -> list[str]:
    """The groups in the table of standings, as they are listed."""
    return page.eval_on_selector_all(
        "#standings tbody tr:not([hidden])", "rows => rows.map(row => row.dataset.group)"
    )


def filtered(page: "Page", axis: str, value: str) -> None:
    before = page.evaluate("document.body.dataset.filtered || '0'")
    page.select_option(f"#only_{axis}", value)
    page.wait_for_function("old => (document.body.dataset.filtered || '0') !== old", arg=before)


@pytest.mark.parametrize("width", [WIDTH, NARROW])
def test_page_draws_every_figure_and_never_scrolls_sideways(report: Path, page: "Page", width: int) -> None:
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.set_viewport_size({"width": width, "height": HEIGHT})
    page.goto(report.as_uri())
    page.wait_for_selector("body[data-drawn]")
    marks = drawn(page)
    assert len(marks) == 16 and all(marks.values()), marks
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(
        "[...document.querySelectorAll('.chart, table')].every(one => one.scrollWidth <= one.parentElement.clientWidth)"
    )
    assert page.locator(".advice").inner_text().startswith("Deploy ")


def test_filter_acts_on_figures_and_table_and_leaves_references(opened: "Page") -> None:
    before = opened.locator(CELLS).count()
    opened.get_by_role("button", name="Show all 19 groups").click()
    scores = dict(opened.eval_on_selector_all(*SCORED))
    filtered(opened, "technique", "ties")
    after = dict(opened.eval_on_selector_all(*SCORED))
    assert after and after.items() <= scores.items(), "hiding groups changed what others scored"
    assert 0 < opened.locator(CELLS).count() < before
    assert all(
        "ties" in group or group.startswith(("zero_shot", "multitask")) for group in rows_shown(opened)
    )
    assert "zero_shot" in rows_shown(opened)
    filtered(opened, "technique", "all")
    assert opened.locator(CELLS).count() == before


def test_filter_of_one_seed_shows_what_that_seed_scored(opened: "Page") -> None:
    cell = opened.locator("#standings tbody tr:first-child td[data-metric=gm]")
    assert "±" in cell.inner_text()
    group = rows_shown(opened)[0]
    filtered(opened, "seed", "1")
    scored = opened.evaluate(
        "group => data.points.filter(row => row.group === group && row.seed === 1).at(-1).gm", group
    )
    assert cell.inner_text() == f"{scored:.3f}"


def test_pareto_front_is_that_of_what_is_shown(opened: "Page") -> None:
    filtered(opened, "deploy", "all")
    beaten = opened.evaluate(
        """() => { const rows = kept("last").filter(row => !row.joint); return rows.filter(row => row.front && rows.some(other =>
            other.ka > row.ka && other.zs > row.zs)).length; }"""
    )
    assert beaten == 0 and opened.evaluate("kept('last').some(row => row.front)")


def test_table_shows_a_dozen_until_all_are_asked_for_and_sorts_by_a_column(opened: "Page") -> None:
    assert len(rows_shown(opened)) == 12
    opened.get_by_role("button", name="Show all 19 groups").click()
    assert len(rows_shown(opened)) == 19
    opened.get_by_role("button", name="ZS", exact=True).press("Enter")
    assert rows_shown(opened)[0] == "zero_shot"
    assert opened.locator("th[aria-sort=descending]").inner_text().startswith("ZS")


def test_figure_without_rows_counts_as_empty(opened: "Page") -> None:
    assert drawn(opened)["techniques"] > 0
    opened.evaluate("choose('technique', 'nothing')")
    opened.wait_for_function(f"() => document.querySelectorAll('{CELLS}').length === 0")
    assert drawn(opened)["techniques"] == 0


def test_drop_down_shows_another_trajectorys_matrix(opened: "Page") -> None:
    before = opened.locator("#matrix .mark-text text").all_inner_texts()
    opened.select_option("#matrix select", "zero_shot-seed0")
    opened.wait_for_function(
        "old => JSON.stringify([...document.querySelectorAll('#matrix .mark-text text')].map(e => e.textContent)) !== old",
        arg=json.dumps(before, separators=(",", ":")),
    )
    assert "Learnt, in order of arrival" in opened.locator("#matrix").inner_text()


def test_difference_says_in_which_settings_its_two_trajectories_differ(opened: "Page") -> None:
    one, other = opened.locator("#difference select").all()
    one.select_option("init_base-deploy_all-ties-x1-seed0")
    other.select_option("init_base-deploy_all-average-x1-seed1")
    told = opened.locator("#difference .differ")
    assert told.inner_text() == "They differ in: technique ties / average; seed 0 / 1."
    other.select_option("init_base-deploy_all-ties-x1-seed0")
    assert told.inner_text().startswith("One and the same trajectory")


def test_drop_down_of_settings_compares_at_another_budget(opened: "Page") -> None:
    texts = opened.locator("#techniques .mark-text text").all_inner_texts()
    lists = opened.locator("#techniques select")
    offered = lists.locator("option").all_inner_texts()
    assert sorted(offered) == ["budget 100 steps", "budget 200 steps"]
    lists.select_option(next(one for one in offered if one != lists.input_value()))
    opened.wait_for_function(
        "old => JSON.stringify([...document.querySelectorAll('#techniques .mark-text text')].map(e => e.textContent)) !== old",
        arg=json.dumps(texts, separators=(",", ":")),
    )


def test_page_can_be_used_with_the_keyboard_and_read_aloud(opened: "Page") -> None:
    """Everything that can be operated has a name and is reached by Tab; every figure is described in words."""
    nameless = opened.evaluate(
        """() => [...document.querySelectorAll('select, button')].filter(one =>
            !(one.textContent.trim() && one.tagName === 'BUTTON') && !(one.labels && one.labels.length && one.labels[0].textContent.trim())).length"""
    )
    assert nameless == 0
    assert (
        opened.locator(".chart svg[aria-label], .chart [role='graphics-document'][aria-label]").count() >= 16
    )
    opened.locator("nav a").first.focus()
    reached = set()
    for _ in range(40):
        opened.keyboard.press("Tab")
        reached.add(opened.evaluate("document.activeElement.id || document.activeElement.dataset.by || ''"))
    assert {"only_technique", "only_seed", "gm", "all"} <= reached


def test_every_link_inside_the_page_leads_to_what_it_names(opened: "Page") -> None:
    assert opened.evaluate(
        "[...document.querySelectorAll('nav a')].every(link => document.querySelector(link.getAttribute('href')) !== null)"
    )
