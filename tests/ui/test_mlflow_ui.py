"""The MLflow UI as a user sees it: from the study to a served checkpoint and its files, by clicking."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from pipeline.tracking.tracker import Tracker, ui_command, ui_url
from tests.pipeline.tracked_study import finished_study
from tests.servers import serving

if TYPE_CHECKING:
    from playwright.sync_api import Page

PATIENCE_MS = 60_000
"""The UI is a large program, and the machine may be busy."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the UI on a delivered study."""
    out = tmp_path_factory.mktemp("ui")
    study = finished_study(out, strategies=("zero_shot", "best_in_time"))
    outbox = study.outbox()
    study.tell(outbox)
    tracker = Tracker(out, outbox, uri=None, experiment="temporal-merge")
    tracker.start()
    assert tracker.close(120) == 0, tracker.last_error
    outbox.close()
    with serving(lambda port: ui_command(out, port=port), out) as port:
        yield ui_url(out, port=port)


@pytest.mark.slow
def test_person_clicks_from_study_to_trajectory_to_model_to_its_files(address: str, page: "Page") -> None:
    page.set_default_timeout(PATIENCE_MS)
    page.goto(address)
    page.get_by_role("link", name="demo", exact=True).click()
    page.get_by_text("with the highest GM at its last t").wait_for()
    page.get_by_role("link", name="best_in_time-t3-photos_b").first.wait_for()
    assert "Agent versions" not in page.inner_text("body"), "the view is not the one for model training"

    page.get_by_role("link", name="best_in_time", exact=True).first.click()
    page.get_by_text("after each task the study serves").wait_for()
    shown = page.inner_text("body")
    for text in (
        "Parent run",
        "strategy.init: ema",
        "ka",
        "zs",
        "gm",
        "score/icons",
        "forgetting",
        "merged_norm",
    ):
        assert text in shown.replace("\n: ", ": "), text

    with page.context.expect_page() as opened:
        page.get_by_role("link", name="best_in_time-t3-photos_b").first.click()
    model = opened.value
    model.set_default_timeout(PATIENCE_MS)
    model.get_by_text("What best_in_time serves after t=3 (photos_b)").wait_for()
    for text in ("Ready", "gm", "score/icons", "demo"):
        model.get_by_text(text, exact=True).first.wait_for()

    model.get_by_text("Artifacts", exact=True).click()
    model.get_by_text("open_clip_model.safetensors").first.wait_for()
    model.get_by_text("manifest.json").first.click()
    model.get_by_text("experts_total").first.wait_for()
    model.get_by_text("MLmodel").first.click()
    model.get_by_text("loader_module").first.wait_for()


@pytest.mark.slow
def test_person_sees_what_an_expert_learned_from_and_what_the_machine_did(address: str, page: "Page") -> None:
    page.set_default_timeout(PATIENCE_MS)
    page.goto(address)
    page.get_by_role("link", name="demo", exact=True).click()
    page.get_by_role("link", name="experts (3)", exact=True).first.click()
    page.get_by_role("link", name="expert t=3 photos_b · init ema · average", exact=True).first.click()
    page.get_by_text("The expert of photos_b (t=3)").wait_for()
    page.get_by_role("link", name="expert-t3-photos_b-init_ema-average").first.wait_for()
    assert "photos_b" in page.inner_text("body") and "training" in page.inner_text("body").lower()
    page.get_by_text("System metrics", exact=True).first.click()
    page.get_by_text("cpu_utilization_percentage").first.wait_for()


@pytest.mark.slow
def test_person_finds_the_best_model_in_the_registry(address: str, page: "Page") -> None:
    page.set_default_timeout(PATIENCE_MS)
    page.goto(address)
    page.get_by_role("link", name="Model registry").click()
    # The registry covers itself with an introduction on a first visit, at any time until its list has come.
    introduction = page.get_by_role("button", name="Try it now")
    page.add_locator_handler(introduction, lambda: introduction.click())
    page.get_by_role("link", name="demo", exact=True).wait_for()
    page.get_by_role("link", name="Version 1").first.click()
    page.get_by_text("highest GM at its last t").wait_for()
    page.get_by_role("link", name="best_in_time-t3-photos_b").first.wait_for()
    page.get_by_text("Inputs (2)").first.wait_for()
    assert "best" in page.inner_text("body")
