"""The pictures of the README's section about the UIs: `python -m tests.screenshots flows/pictures --store STORE`.

The store is one in which `diffusion demo` has ended. A stack is started on it, the pipeline is run from its form, where
most of it is found done, and twice under another name, the second time with a question to a person.
"""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect

from tests.browser import HEIGHT, WIDTH, Form, browser_page, show_report
from tests.local_stack import Api, diffusion, free_port

LIMIT_BYTES = 150_000
COLOURS = 64
PIPELINE = "diffusion-pipeline/pipeline"


def take(page: Page, file: Path, height: int = HEIGHT) -> None:
    """A picture of what the page shows, with few colours; fails if it is large."""
    page.set_viewport_size({"width": WIDTH, "height": height})
    page.wait_for_timeout(2000)  # pictures and graphs draw themselves in
    shown = Image.open(BytesIO(page.screenshot())).convert("RGB")
    shown.quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
    assert file.stat().st_size < LIMIT_BYTES, f"{file} has {file.stat().st_size} bytes"


def reach(api: Api, run_id: str, state: str) -> None:
    found = api.wait_for(run_id, state, "COMPLETED", "FAILED", "CRASHED", seconds=900)["state"]
    assert found["type"] == state, found["message"]


def of_a_run(page: Page, url: str, api: Api, folder: Path) -> None:
    """The form as it is filled in, its run, and the report of this."""
    form = Form(page, url, api.deployments()[PIPELINE]["id"])
    form.choose("Preset", "digits")
    form.fill("Images to make", "1000")
    form.fill("Overrides", "generation.guidance.scale: 1.5\ngeneration.sampler.steps: 25")
    take(page, folder / "form.png", height=2060)
    run_id = form.submit()
    reach(api, run_id, "COMPLETED")
    page.goto(f"{url}/runs/flow-run/{run_id}")
    expect(page.get_by_text("Completed").first).to_be_visible()
    take(page, folder / "run.png")
    show_report(page, "pipeline")
    take(page, folder / "report.png", height=2600)


def of_an_approval(page: Page, url: str, api: Api, folder: Path) -> None:
    """A run that waits for a person: whether the model of the demo follows a champion that was trained for seconds."""

    def started(*more: str) -> str:
        lines = ["name: night", "dataset.name: digits", "generation.count: 16", *more]
        return api.start(PIPELINE, {"preset": "digits", "overrides": "\n".join(lines)})

    short = ("training.seed: 2", "training.images: 6400", "gate.first_limit: 1000", "gate.min_accuracy: null")
    reach(api, started(*short), "COMPLETED")
    run_id = started("gate.approval: ask")
    reach(api, run_id, "PAUSED")
    page.goto(f"{url}/runs/flow-run/{run_id}")
    show_report(page, "approval")
    take(page, folder / "approval.png", height=920)
    page.goto(f"{url}/runs/flow-run/{run_id}")
    page.get_by_role("button", name="Resume").click()
    take(page, folder / "answer.png")
    api(f"flow_runs/{run_id}/resume", {"run_input": {"decision": "refuse", "reason": "A picture.", "by": "Nobody"}})
    reach(api, run_id, "COMPLETED")


def of_the_registry(page: Page, url: str, folder: Path) -> None:
    page.goto(f"{url}/#/models/digits/versions/1")
    expect(page.get_by_text("champion").first).to_be_visible()
    page.get_by_text("MLflow Assistant").locator("xpath=ancestor::*[.//button][1]").get_by_role("button").last.click()
    take(page, folder / "model.png")


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, help="Where the pictures go.")
    parser.add_argument("--store", default="store", help="A store in which diffusion demo has ended.")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    ports = ("--prefect-port", free_port(), "--mlflow-port", free_port())
    try:
        services = diffusion("stack", "up", "--store", options.store, *ports)
        urls = {service["name"]: service["url"] for service in services}
        api = Api(urls["prefect"])
        with browser_page() as (page, _):
            of_a_run(page, urls["prefect"], api, options.folder)
            of_the_registry(page, urls["mlflow"], options.folder)
            of_an_approval(page, urls["prefect"], api, options.folder)
    finally:
        diffusion("stack", "down", "--store", options.store)


if __name__ == "__main__":
    main()
