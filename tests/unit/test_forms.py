"""The forms of the Prefect UI: few plain inputs, names instead of URIs, and mistakes in one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from diffusion_core.config import UserError
from diffusion_core.stages.compare import CompareOptions
from diffusion_core.stages.generate import ChampionOptions
from diffusion_core.stages.pipeline import PipelineOptions
from diffusion_core.stages.prune import PruneOptions
from diffusion_core.stages.registry import STAGES
from diffusion_core.stages.settings import load_config
from flows.forms import FORMS, filled_in, in_words
from flows.stack import pool
from flows.stages import FLOWS

INTERNAL = {"asked_by", "asked", "bundle_uri", "mlflow_run_id", "config", "settings", "first_image_id"}


def _inputs(name: str) -> dict[str, Any]:
    return FORMS[name].parameters.properties


def test_there_is_a_form_for_the_pipeline_and_for_each_stage() -> None:
    assert {"pipeline", "generate-from-champion", *STAGES} == set(FORMS)
    assert list(_inputs("generate-from-champion")) == ["model", "count", "labels", "format", "store"]
    assert {"source", "image_size", "time_budget", "images", "workers", "gpus_per_worker", "count"} <= set(
        _inputs("pipeline")
    )


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_one_screen_of_plain_inputs(name: str) -> None:
    inputs, schema = _inputs(name), FORMS[name].parameters
    assert len(inputs) <= 25 and not schema.definitions
    assert INTERNAL.isdisjoint(inputs) and not any(key.endswith(("_uri", "uri")) for key in inputs)
    for key, each in inputs.items():
        assert each["type"] in ("string", "integer", "number", "boolean") and "anyOf" not in each, key
        assert each["title"][0].isupper() and "_" not in each["title"], key
        assert each["description"].endswith((".", "…")), key
        assert "default" not in each, "what is left empty is not sent, and comes from the preset"
    assert set(schema.required) <= {"model", "run", "sigma_rel"}


def test_the_schemas_know_bounds_and_choices() -> None:
    inputs = _inputs("generate")
    assert inputs["format"]["enum"] == ["parquet", "webdataset", "png"] and inputs["count"]["minimum"] == 1
    assert {"digits", "cifar10"} <= set(inputs["preset"]["enum"])


@pytest.mark.parametrize("name", FLOWS)
def test_no_form_asks_for_what_is_the_programs_own(name: str) -> None:
    (definition,) = (each for key, each in FLOWS[name].parameters.definitions.items() if key.endswith("Request"))
    inputs = definition["properties"].keys()
    assert {"asked_by", "asked", "mlflow_run_id"}.isdisjoint(inputs)
    assert name != "generate" or "bundle_uri" not in inputs
    assert name not in ("prune", "export") or "resources" not in inputs, "neither has workers"
    assert ("backend" in FLOWS[name].parameters.properties) == STAGES[name].load().is_job


def test_what_is_left_empty_comes_from_the_preset() -> None:
    """Empty text is what the browser sends for an input that was filled in and emptied again."""
    empty = dict.fromkeys(_inputs("pipeline"))
    options, config = filled_in(PipelineOptions, {**empty, "preset": "digits", "image_size": "", "overrides": ""})
    assert options.model_fields_set <= {"preset", "settings"}
    assert config == load_config("digits")


def test_inputs_and_override_lines_are_the_configuration_of_the_verb() -> None:
    lines = "training.batch_size: 256\n\n  network.base_channels = 16 \ngate.min_accuracy: null\n"
    given = {"preset": "digits", "count": 7, "gpus_per_worker": 0.5, "time_budget": "1h30m", "overrides": lines}
    config = filled_in(PipelineOptions, given)[1]
    assert (config.training.batch_size, config.network.base_channels) == (256, 16)
    assert config.gate.min_accuracy is None and config.generation.count == 7
    assert config.training.time_budget_s == 5400
    assert (config.resources.train.gpus_per_worker, config.resources.shard.gpus_per_worker) == (0.5, 0)

    several = filled_in(CompareOptions, {"model": "digits@champion", "sampler": "ddim:10, heun:4"})[1].comparison
    assert [each.label for each in several.contestants] == ["ddim:10", "heun:4"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("training.bach_size: 256", r"overrides training\.bach_size: .*did you mean training\.batch_size"),
        ("training.batch_size 256", r"overrides training\.batch_size 256: give a field and a value"),
        ("training.batch_size: many", r"training\.batch_size: 'many' is not accepted"),
        ("training.batch_size: [", r"overrides training\.batch_size: '\[' is not a YAML value"),
    ],
)
def test_a_wrong_line_is_one_sentence(line: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as refused:
        filled_in(PipelineOptions, {"preset": "digits", "overrides": f"training.seed: 1\n{line}"})
    assert "\n" not in str(refused.value)


def test_a_wrong_input_is_told_by_its_title() -> None:
    with pytest.raises(UserError, match=r"^Image size \(pixels\) 32y: give pixels"):
        filled_in(PipelineOptions, {"preset": "digits", "image_size": "32y"})
    with pytest.raises(UserError, match=r"Say what to work on: Preset .* or Source with Name"):
        filled_in(PipelineOptions, {"count": 3})


def test_what_an_api_sends_may_be_no_text() -> None:
    given = {"preset": "digits", "image_size": 8, "overrides": {"training": {"batch_size": 256}}}
    config = filled_in(PipelineOptions, given)[1]
    assert (config.dataset.size, config.training.batch_size) == ((8, 8), 256)
    options = filled_in(CompareOptions, {"model": "digits@champion", "sampler": ["ddim:10", "heun:4"]})[0]
    assert options.sampler == ("ddim:10", "heun:4")
    for wrong, said in (
        ({"overrides": ["a"]}, "^overrides: .* fields and values"),
        ({"count": ["a"]}, "^generation.c"),
    ):
        with pytest.raises(UserError, match=said) as refused:
            filled_in(PipelineOptions, {"preset": "digits", **wrong})
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("model", "said"),
    [("digts", "^Model digts: There is no registered model 'digts'"), ("digits@latest", "^Model .*: give the name")],
)
def test_a_form_of_the_champion_tells_a_wrong_model_by_its_title(store: str, model: str, said: str) -> None:
    options, config = filled_in(ChampionOptions, {"model": model, "count": 5, "store": store})
    with pytest.raises(UserError, match=said), in_words(ChampionOptions):
        options.request(config)


def test_a_wrong_age_of_a_prune_is_told_by_its_title(store: str) -> None:
    options, config = filled_in(PruneOptions, {"older_than": "soon", "store": store})
    with pytest.raises(UserError, match=r"^Older than soon: it is not a time"), in_words(PruneOptions):
        options.request(config)


def test_deployments_know_the_store_and_their_queue() -> None:
    forms = {each.name: each for each in pool.deployments("/the/store") if "form" in each.tags}
    assert forms.keys() == FORMS.keys()
    assert all(each.parameters == {"store": "/the/store"} for each in forms.values())
    queues = {name: forms[name].work_queue_name for name in ("pipeline", "train", "generate-from-champion", "shard")}
    assert list(queues.values()) == ["training", "training", "generation", "default"]
    assert {each.entrypoint for each in forms.values()} == {f"flows.forms.{name.replace('-', '_')}" for name in FORMS}
