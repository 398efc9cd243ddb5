"""Prefect's UI as a person meets it: a form is filled in, clicked, and its run looked at, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.browser import CHROMIUM, Form, OnlyLoopback, browser_page, show_report
from tests.local_stack import Api, LocalStack, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; on Debian: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def urls(stack: LocalStack) -> dict[str, str]:
    """Where the UIs of the stack are, by service."""
    return {name: service["url"] for name, service in stack.services.items()}


@pytest.fixture(scope="module")
def url(urls: dict[str, str]) -> str:
    """Where Prefect's UI is."""
    return urls["prefect"]


@pytest.fixture(scope="module")
def browser(url: str) -> Iterator[tuple[Page, OnlyLoopback]]:
    with browser_page() as opened:
        yield opened


@pytest.fixture
def page(browser: tuple[Page, OnlyLoopback]) -> Iterator[Page]:
    """The page, which has asked for nothing but loopback at the end of each test."""
    page, gate = browser
    yield page
    assert gate.refused == []


@pytest.fixture
def form(page: Page, url: str) -> Form:
    return Form(page, url, Api(url).deployments()["diffusion-pipeline/pipeline"]["id"])


def _state(url: str, run_id: str, page: Page) -> Any:
    """The final state of a run, with the browser on its page."""
    page.goto(f"{url}/runs/flow-run/{run_id}")
    return Api(url).wait_for(run_id, "COMPLETED", "FAILED", "CRASHED", seconds=400)["state"]


def _log(url: str, run_id: str) -> list[str]:
    """The log of a run that has ended; its last line arrives a moment later."""
    api, asked = Api(url), {"logs": {"flow_run_id": {"any_": [run_id]}}}

    def whole() -> list[str]:
        lines = [line["message"] for line in api("logs/filter", asked)]
        return lines if any("Finished in state" in line for line in lines) else []

    return list(wait_for(whole, "the end of the log", 30))


def test_the_form_is_one_screen_and_shows_in_seconds(form: Form) -> None:
    form.shows("Overrides", within_s=60)  # the server and the browser are cold
    form.open()
    form.shows("Overrides", within_s=5)
    assert 10 <= form.inputs.count() <= 25


def test_a_wrong_override_line_is_one_sentence(form: Form, page: Page, url: str) -> None:
    form.choose("Preset", "digits")
    form.fill("Overrides", "training.bach_size: 256")
    run_id = form.submit()
    state = _state(url, run_id, page)
    assert state["type"] == "FAILED" and state["message"].count("\n") == 0
    sentence = "overrides training.bach_size: there is no such field, did you mean training.batch_size"
    assert sentence in state["message"]
    assert not [line for line in _log(url, run_id) if "Traceback" in line]
    expect(page.get_by_text(sentence).first).to_be_visible()


def test_a_run_started_by_clicks_completes_and_shows_its_report(
    form: Form, page: Page, url: str, urls: dict[str, str]
) -> None:
    form.choose("Preset", "digits")
    form.fill("Training length (images)", "640")
    form.fill("Images to measure", "100")
    form.fill("Images to make", "32")
    quick = ["evaluation.classifier.images: 2000", "evaluation.sampler.steps: 4", "training.log_every_images: 128"]
    form.fill("Overrides", "\n".join(quick))
    run_id = form.submit()
    said = Api(url).run(run_id)["parameters"]
    assert "store" in said and {"images": 640, "samples": 100, "count": 32}.items() <= said.items()
    assert "batch_size" not in said, "what is left empty is not said"
    state = _state(url, run_id, page)
    assert state["type"] == "COMPLETED", state["message"]

    show_report(page, "pipeline")
    expect(page.locator(".markdown-renderer__heading", has_text="Training loss")).to_be_visible()
    sheets = page.locator(".markdown-renderer img[src^='data:image/png']")
    expect(sheets).to_have_count(3)  # of the generated images, of the version, and the loss
    widths = [sheet.evaluate("async image => (await image.decode(), image.naturalWidth)") for sheet in sheets.all()]
    assert min(widths) > 50
    for shown in ("experiments/", "models/digits/versions/1"):
        expect(page.locator(f"a[href^='{urls['mlflow']}/#/{shown}']").first).to_be_visible()
    expect(page.get_by_text("32 images, 32 new").first).to_be_visible()
