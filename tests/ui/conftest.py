"""A real browser for the pages: the system's chromium, headless, driven over its own protocol."""

import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDTH, HEIGHT = 1280, 900


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Chromium, for one file of tests: while it is driven, an event loop runs in this thread, and `asyncio.run` is refused."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        if os.environ.get("CI"):
            pytest.fail("chromium is not installed: make browser")
        pytest.skip("needs chromium: make browser")
    with sync_playwright() as driver:
        # As root (a container, CI) chromium has no sandbox of its own.
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: "Browser", request: pytest.FixtureRequest) -> Iterator["Page"]:
    """A page at 1280 px. It fails the test if a script of the page fails or anything but loopback and files is requested. With
    SCREENSHOTS=DIR its final content is kept there.
    """
    context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT})
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(f"script: {error}"))
    opened.on(
        "request",
        lambda request: (
            None
            if request.url.startswith(("http://127.0.0.1:", "file://", "data:", "blob:"))
            else wrong.append(f"outside: {request.url}")
        ),
    )
    yield opened
    if os.environ.get("SCREENSHOTS"):
        context.pages[-1].screenshot(path=f"{os.environ['SCREENSHOTS']}/{request.node.name}.png")
    context.close()
    assert wrong == []
