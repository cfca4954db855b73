"""The page of a service in a real browser: by keyboard, on a phone, in the dark, after many arrivals of people with hostile names."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from pipeline.service.home import Home
from pipeline.service.tokens import Tokens
from tests.pipeline.service import toys
from tests.pipeline.service.page_toys import HOSTILE, application, crowded, listening

if TYPE_CHECKING:
    from playwright.sync_api import Page

PHONE, TABLET, DESK = 320, 800, 1280
MANY = 1000
ACCEPTED, STOPPED = "a-000003", "a-000013"
"""The first arrival, and the third."""
CONTRAST = """() => {
    const parts = text => text.match(/[0-9.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, at) => sum + v * [.2126, .7152, .0722][at], 0);
    const behind = one => { while (one) { const c = parts(getComputedStyle(one).backgroundColor);
        if (c.length < 4 || c[3] > 0) return c; one = one.parentElement; } return [255, 255, 255]; };
    return Math.min(...[...document.querySelectorAll('p, td, th, dd, dt, a, button, label, h1, h2, .status')].filter(one =>
        one.textContent.trim() && one.getClientRects().length).map(one => {
        const [a, b] = [light(parts(getComputedStyle(one).color)), light(behind(one))].sort((x, y) => y - x);
        return (a + .05) / (b + .05); }));
}"""
"""The least contrast of a text with what is behind it (WCAG 2.2)."""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The address of a service with many arrivals, and an operator's token."""
    room = tmp_path_factory.mktemp("many")
    tokens = Tokens(room / "tokens.json")
    home = crowded(toys.home(room / "out"), room / "log", MANY)
    with listening(application(home, room, tokens)) as address:
        yield address, tokens.issue("operator")[0]


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Home]]:
    """A service of three accepted experts, each trained from what was deployed before it, and an operator's token."""
    room = tmp_path_factory.mktemp("folded")
    home = toys.home(room / "out", {"init": "ema", "deploy": "ema", "technique": "average"})
    tokens, init = Tokens(room / "tokens.json"), "base"
    for task in toys.TASKS[:3]:
        toys.arrive(home, toys.expert(room, task), task, init=init)
        init = home.log.state.served.sha256
    with listening(application(home, room, tokens)) as address:
        yield address, tokens.issue("operator")[0], home


def sign_in(page: "Page", address: str, token: str) -> None:
    """By keyboard alone: the field has the focus."""
    page.goto(address)
    page.wait_for_selector("#token:focus")
    page.keyboard.type(token)
    page.keyboard.press("Enter")
    page.wait_for_selector("#arrivals")


@pytest.mark.parametrize("width", [PHONE, TABLET, DESK])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_after_many_arrivals_never_scrolls_sideways_and_can_be_read(
    many: tuple[str, str], page: "Page", width: int, scheme: str
) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.set_viewport_size({"width": width, "height": 900})
    sign_in(page, *many)
    assert page.locator("table.rows tbody tr").count() == 50
    for path, name in (
        (f"/page/arrivals/{ACCEPTED}", ACCEPTED),
        (f"/page/arrivals/{STOPPED}", STOPPED),
        ("/?page=2", "toy"),
    ):
        page.goto(many[0] + path)
        assert page.locator("h1").inner_text().startswith(name)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        assert page.evaluate(CONTRAST) >= 4.5, path
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")


def test_hostile_names_are_shown_and_never_executed(many: tuple[str, str], page: "Page") -> None:
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    sign_in(page, *many)
    assert page.get_by_text(HOSTILE).count() > 0
    page.goto(f"{many[0]}/page/arrivals/{ACCEPTED}")
    assert page.get_by_text(HOSTILE).count() > 0
    assert page.evaluate("document.scripts.length + document.images.length") == 0
    assert "owned" not in page.title() and complaints == []


def test_pages_of_arrivals_are_turned_by_keyboard(many: tuple[str, str], page: "Page") -> None:
    sign_in(page, *many)
    first = page.locator("tbody th").first.inner_text()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.get_by_role("link", name="Older").press("Enter")
    page.wait_for_url("**/?page=2")
    assert page.locator("tbody th").first.inner_text() < first
    page.get_by_role("link", name="Newer").press("Enter")
    page.wait_for_url("**/?page=1")


def test_operator_rolls_back_and_removes_by_keyboard_and_decides_about_descendants(
    folded: tuple[str, str, Home], page: "Page"
) -> None:
    address, token, home = folded
    sign_in(page, address, token)
    nameless = (
        "[...document.querySelectorAll('input:not([type=hidden])')].filter(one => !one.labels.length).length"
    )
    assert page.evaluate(nameless) == 0
    page.get_by_label("t", exact=True).fill("1")
    page.get_by_label("Reason").fill("complaints")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("dd strong", has_text="t = 1").first.wait_for()
    assert home.log.refresh().served.t == 1

    first, *later = home.log.state.arrivals
    page.goto(f"{address}/page/arrivals/{first}")
    for name in later:
        assert page.locator("svg").get_by_text(name).count() == 1
    page.locator("summary", has_text="Remove").press("Enter")
    page.locator("#remove-reason").fill("takedown")
    page.locator("#remove-reason").press("Enter")
    assert home.log.refresh().arrivals[first].status == "accepted"  # a decision about descendants is required
    if shots := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{shots}/remove.png", full_page=True)
    page.get_by_label("remove them too").check()
    page.locator("#remove-reason").press("Enter")
    page.locator("h1 .status", has_text="removed").wait_for()
    state = toys.work(home)
    assert {state.arrivals[name].status for name in (first, *later)} == {"removed"} and state.served.t == 0


def test_form_of_another_site_does_nothing(folded: tuple[str, str, Home], page: "Page") -> None:
    address, token, home = folded
    sign_in(page, address, token)
    before, site = home.log.refresh().seq, page.context.new_page()
    site.set_content(
        f'<form method="post" action="{address}/page/rollback"><input name="t" value="0"><input name="reason" value="x">'
        "<button>Win</button></form>"
    )
    site.get_by_role("button").click()
    site.wait_for_selector("[role=alert]")
    assert home.log.refresh().seq == before
