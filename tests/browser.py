"""A headless Chromium that reaches loopback alone, and the pages of Prefect's UI as a person goes through them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from playwright.sync_api import Locator, Page, Route, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDTH, HEIGHT = 1200, 800
PATIENCE_MS = 30_000  # for what a busy machine shows late


class OnlyLoopback:
    """Lets a page load from this machine alone, and keeps what else it asked for."""

    def __init__(self) -> None:
        self.refused: list[str] = []

    def __call__(self, route: Route) -> None:
        if urlsplit(route.request.url).hostname in ("127.0.0.1", None):
            route.continue_()
        else:
            self.refused.append(route.request.url)
            route.abort()


@contextmanager
def browser_page() -> Iterator[tuple[Page, OnlyLoopback]]:
    """A page of a browser of its own, which is closed afterwards."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            page.set_default_timeout(PATIENCE_MS)
            gate = OnlyLoopback()
            page.route("**/*", gate)
            yield page, gate
        finally:
            browser.close()


class Form:
    """The form of a deployment, as it is shown."""

    def __init__(self, page: Page, url: str, deployment_id: str) -> None:
        self._page, self._url = page, f"{url}/deployments/deployment/{deployment_id}/run"
        self.open()

    def open(self) -> None:
        """Load it anew."""
        self._asked = time.monotonic()
        self._page.goto(self._url)

    @property
    def inputs(self) -> Locator:
        return self._page.locator(".schema-form-property")

    def shows(self, title: str, within_s: float) -> None:
        """Wait until the input of this title is there; fails if that takes longer, counted from before the load."""
        left = self._asked + within_s - time.monotonic()
        assert left > 0, f"loading the page alone took more than {within_s} s"
        expect(self._input(title)).to_be_visible(timeout=1000 * left)

    def fill(self, title: str, value: str) -> None:
        self._input(title).locator("textarea, input").fill(value)

    def choose(self, title: str, value: str) -> None:
        self._input(title).locator(".p-select-button__icon").click()
        self._page.locator(".p-select-option").get_by_text(value, exact=True).click()

    def submit(self) -> str:
        """Start the run; its id. Prefect answers 503 while its database is locked, and a person clicks again then."""
        for _ in range(5):
            with self._page.expect_response("**/create_flow_run") as answer:
                self._page.get_by_role("button", name="Submit").click()
            if answer.value.status != 503:
                break
        assert answer.value.ok, answer.value.text()
        return str(answer.value.json()["id"])

    def _input(self, title: str) -> Locator:
        return self.inputs.filter(has=self._page.get_by_text(f"{title} (Optional)", exact=True))


def show_report(page: Page, key: str) -> None:
    """From the page of a run to one of the reports that it made."""
    page.locator("li.p-tab", has_text="Artifacts").click()
    page.locator(".artifact-card__title").get_by_text(key, exact=True).click()
    expect(page.locator(".markdown-renderer").first).to_be_visible()
