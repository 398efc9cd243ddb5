"""Configurations from presets, files and overrides: the last word wins, and every shipped preset is whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from diffusion_core.config import UserError
from diffusion_core.evaluation.comparison import check_contestants
from diffusion_core.networks.config import DiTConfig, NoisyClassifierConfig, UNetConfig, check_image_size
from diffusion_core.stages.checks import check_unmoved
from diffusion_core.stages.compare import CompareOptions
from diffusion_core.stages.config import PipelineConfig
from diffusion_core.stages.generate import GenerateOptions
from diffusion_core.stages.options import understood
from diffusion_core.stages.pipeline import PipelineOptions
from diffusion_core.stages.settings import as_values, field_paths, load_config, preset_names, seconds


def test_the_presets_are_there_and_whole():
    assert {"cifar10", "digits", "fashion-mnist"} < set(preset_names())
    for name in preset_names():
        config = load_config(preset=name)
        assert config.name == name
        assert config.dataset.name == ("digits" if name.startswith("digits") else name)  # methods share a dataset
        assert config.dataset.size is not None
        check_image_size(config.network, *config.dataset.size)
        assert config.generation.first_image_id == 0  # so that a second run finds its images
        check_contestants(config.comparison, config.process, ["one", "another"])


def test_a_configuration_survives_being_written_as_yaml(tmp_path: Path):
    config = load_config(preset="fashion-mnist")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(as_values(config)))
    assert load_config(file=str(path)) == config


def test_the_last_word_wins(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("preset: digits\nname: mine\ntraining: {seed: 1, batch_size: 32, microbatch_size: 8}\n")
    config = load_config(
        file=str(path), settings=["training.seed=2", "training.batch_size=64"], shortcuts={"training.batch_size": "16"}
    )
    assert (config.name, config.dataset.name) == ("mine", "mine")
    assert (config.training.seed, config.training.batch_size, config.training.microbatch_size) == (2, 16, 8)
    assert config.training.learning_rate == load_config(preset="digits").training.learning_rate


def test_the_sampler_is_an_option_of_its_own():
    config = understood(GenerateOptions, {"preset": "digits", "sampler": "dpmpp_2m", "steps": "12"})[1]
    assert (config.generation.sampler.kind, config.generation.sampler.steps) == ("dpmpp_2m", 12)
    with pytest.raises(UserError, match=r"sampler\.kind.*'euclid'.*unipc"):
        understood(GenerateOptions, {"preset": "digits", "sampler": "euclid"})


def test_contestants_as_typed():
    contestants = ["ddpm:9", "heun:4:linspace@2"]
    typed = {"preset": "digits", "model": "m", "sampler": contestants, "seeds": "3", "images": "32"}
    config = understood(CompareOptions, {**typed, "guidance": "1.5"})[1].comparison
    assert [each.label for each in config.contestants] == ["ddpm:9", "heun:4:linspace@2"]
    assert (config.reference_name, config.candidate, config.seeds, config.images) == ("ddpm:9", None, 3, 32)
    assert [config.guidance_of(each).scale for each in config.contestants] == [1.5, 2.0]
    config = understood(CompareOptions, {**typed, "candidate": "ddpm:9", "reference": "heun:4:linspace@2"})[1]
    assert (config.comparison.reference_name, config.comparison.candidate) == ("heun:4:linspace@2", "ddpm:9")
    with pytest.raises(UserError, match=r"comparison: the candidate ddim:3 is not among the contestants.* heun:4"):
        understood(CompareOptions, {**typed, "candidate": "ddim:3"})


def test_values_are_yaml():
    config = load_config(
        preset="digits",
        settings=[
            "training.learning_rate=1e-4",
            "network.channel_multipliers=[1, 2]",
            "training.time_budget_s=null",
            "generation.sampler={kind: ddpm, steps: 7}",
            "generation.labels=[1, 7]",
        ],
    )
    assert config.training.learning_rate == 1e-4
    assert config.training.time_budget_s is None
    assert (config.generation.sampler.kind, config.generation.sampler.steps) == ("ddpm", 7)
    assert config.generation.labels == (1, 7)


def test_a_pipeline_is_not_guided_by_an_alias_that_it_may_move():
    for field in ("training.init_from", "evaluation.guidance.guide", "generation.guidance.classifier"):
        with pytest.raises(UserError, match=rf"{field}: models:/digits@champion means another version once"):
            check_unmoved(field, "models:/digits@champion", "digits")
        check_unmoved(field, "models:/digits/1", "digits")
        check_unmoved(field, "models:/digits-v@champion", "digits")


def test_a_network_of_another_kind_starts_from_its_own_defaults(tmp_path: Path):
    """What the preset says of its U-Net means nothing to a transformer."""
    settings = ["network.width=64", "network.kind=dit"]
    assert load_config("digits", settings=settings).network == DiTConfig(width=64)
    path = tmp_path / "mine.yaml"
    path.write_text("preset: digits\nnetwork: {kind: dit, depth: 3}\n")
    assert load_config(file=str(path)).network == DiTConfig(depth=3)
    assert load_config(file=str(path), settings=["network.kind=unet"]).network == UNetConfig()
    classifier = load_config("digits", settings=["network.kind=classifier"]).network
    assert isinstance(classifier, NoisyClassifierConfig)  # half of the preset's U-Net
    assert (classifier.base_channels, classifier.channel_multipliers) == (32, (1, 2))
    same = load_config("digits", settings=["network.kind=unet", "network.dropout=0.5"]).network
    assert same == load_config("digits").network.model_copy(update={"dropout": 0.5})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["network.kind=dit", "network.base_channels=64"],
            r"^network\.base_channels: there is no such field of kind=dit",
        ),
        (["network.width=64"], r"^network\.width: there is no such field of kind=unet"),
        (["network.base_channels=x"], r"^network\.base_channels: 'x' is not accepted"),
        (["network.kind=vit"], r"^network: .*'vit'.* is not accepted: its kind must be unet, dit or classifier\.$"),
        (
            ["network.kind=dit", "network.widht=8"],
            r"network\.widht: there is no such field, did you mean network\.width",
        ),
    ],
)
def test_mistakes_in_a_network_are_named(settings: list[str], said: str):
    with pytest.raises(UserError, match=said):
        load_config("digits", settings=settings)


def test_a_form_offers_every_kind_of_network():
    """As `anyOf`, which Prefect's forms show; a filled-in form without a kind can only be meant as a U-Net."""
    schema = PipelineConfig.model_json_schema()
    choices = [choice["$ref"].rpartition("/")[2] for choice in schema["properties"]["network"]["anyOf"]]
    assert choices == ["UNetConfig", "DiTConfig", "NoisyClassifierConfig"]
    assert all(schema["$defs"][name]["required"] == ["kind"] for name in choices[1:])
    assert as_values(load_config("digits", settings=["network.kind=dit"]))["network"]["kind"] == "dit"


def test_a_source_replaces_the_bundled_digits(tmp_path: Path):
    given = {"preset": "digits", "source": str(tmp_path), "image_size": "16x8", "workers": "1"}
    options, config = understood(PipelineOptions, given)
    assert options.workers == 1
    assert (config.source.kind, config.source.uri) == ("auto", str(tmp_path))
    assert config.dataset.size == (16, 8)
    assert config.resources.train.workers == config.resources.generate.workers == 1
    assert understood(PipelineOptions, {"preset": "cifar10", "source": "digits"})[1].source.kind == "digits"


@pytest.mark.parametrize(
    ("typed", "labels"),
    [("balanced", "balanced"), ("3,5", (3, 5)), ("cat, dog", ("cat", "dog")), ("labels.txt", "labels.txt")],
)
def test_labels_as_typed(typed: str, labels: object):
    assert understood(GenerateOptions, {"preset": "digits", "labels": typed})[1].generation.labels == labels


def test_times():
    assert [seconds(text) for text in ("90", "90s", "20m", "1h30m", "0.5h")] == [90, 90, 1200, 5400, 1800]
    for text in ("", "m", "soon", "-3", "3x"):
        with pytest.raises(UserError, match="not a time"):
            seconds(text)


def test_every_field_has_a_description():
    def without(model: type, prefix: str = "") -> list[str]:
        missing = []
        for name, field in model.model_fields.items():
            if not field.description:
                missing.append(prefix + name)
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                missing += without(field.annotation, f"{prefix}{name}.")
        return missing

    assert without(PipelineConfig) == []
    assert "training.batch_size" in field_paths()
