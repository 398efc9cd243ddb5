"""Stage by stage through the command, on what a pipeline left: each verb finds it, and goes on from it.

Comes after `test_pipeline.py`, which expects the store to hold the pipeline's work alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.tiny_pipeline import COUNT, SETTINGS

Say = Callable[..., dict[str, Any]]
LONGER = 896


@pytest.fixture
def say(first: Any, pipeline_store: str, ray_cluster: object, capsys: pytest.CaptureFixture[str]) -> Say:
    """Types a command, and returns what it answers."""
    from flows.cli import main

    def command(*words: str) -> dict[str, Any]:
        capsys.readouterr()
        status = main([*words, "--store", pipeline_store, "--json"])
        told = capsys.readouterr()
        assert status == 0, told.err
        return dict(json.loads(told.out))

    return command


CHOSEN = ["--preset", "digits", *(word for setting in SETTINGS for word in ("--set", setting))]


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_every_verb_goes_on_from_the_pipeline(first: Any, say: Say) -> None:
    dataset = say("shard", *CHOSEN)
    assert (dataset["uri"], dataset["reused"]) == (first.dataset.uri, True)

    run = say("train", *CHOSEN, "--images", str(LONGER))
    assert (run["run_id"], run["images_seen"], run["reused"]) == (first.run.run_id, LONGER, False)

    report = say("evaluate", *CHOSEN, "--model", run["run_id"][:8])
    assert set(report["figures"]) == set(first.evaluation.figures) and report["floor"] == first.evaluation.floor
    assert report["uri"] != first.evaluation.uri

    version = say("register", *CHOSEN, "--model", run["bundle_uri"])
    assert (version["model"], version["version"]) == (first.version.model, first.version.version + 1)

    model = f"{version['model']}/{version['version']}"
    images = say("generate", *CHOSEN, "--model", model, "--count", str(COUNT // 2))
    assert (images["model_version"], images["images"], images["generated"]) == (model, COUNT // 2, COUNT // 2)
    more = say("generate", *CHOSEN, "--model", model, "--count", str(COUNT))
    assert (more["set_id"], more["total_images"], more["generated"]) == (images["set_id"], COUNT, COUNT // 2)

    assert say("promote", version["model"], str(version["version"]))["version"] == version["version"]
    assert say("rollback", version["model"])["version"] == first.version.version
    again = say("generate", *CHOSEN, "--count", str(COUNT))
    assert (again["model_version"], again["generated"]) == (first.images.model_version, 0)


def test_the_form_of_the_champion_asks_for_new_images_of_it(first: Any, pipeline_store: str) -> None:
    from diffusion_core.stages.generate import ChampionOptions
    from flows.forms import filled_in

    given = {"model": first.version.model, "count": 5, "store": pipeline_store}
    options, config = filled_in(ChampionOptions, given)
    request = options.request(config)
    assert (request.model, request.generation.count) == (f"models:/{first.version.model}@champion", 5)
    assert request.generation.first_image_id is None
