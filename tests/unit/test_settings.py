"""Configurations from presets, files and overrides: the last word wins, and every shipped preset is whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from diffusion_core.config import UserError
from diffusion_core.networks.config import check_image_size
from flows.config import PipelineConfig
from flows.settings import as_values, field_paths, load_config, preset_names, seconds
from flows.shortcuts import load


def test_the_presets_are_there_and_whole():
    assert preset_names() == ["cifar10", "digits", "fashion-mnist"]
    for name in preset_names():
        config = load_config(preset=name)
        assert config.name == config.dataset.name == name
        assert config.dataset.size is not None
        check_image_size(config.network, *config.dataset.size)
        assert config.generation.first_image_id == 0  # so that a second run finds its images


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
    config = load("digits", None, [], False, {"sampler": "dpmpp_2m", "steps": "12"})
    assert (config.generation.sampler.kind, config.generation.sampler.steps) == ("dpmpp_2m", 12)
    with pytest.raises(UserError, match=r"sampler\.kind.*'euclid'.*unipc"):
        load("digits", None, [], False, {"sampler": "euclid"})


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


def test_a_source_replaces_the_bundled_digits(tmp_path: Path):
    config = load("digits", None, [], True, {"source": str(tmp_path), "image_size": "16x8", "workers": "1"})
    assert (config.source.kind, config.source.uri) == ("auto", str(tmp_path))
    assert config.dataset.size == (16, 8)
    assert config.resources.train.workers == config.resources.generate.workers == 1
    assert load("cifar10", None, [], True, {"source": "digits"}).source.kind == "digits"


@pytest.mark.parametrize(
    ("typed", "labels"),
    [("balanced", "balanced"), ("3,5", (3, 5)), ("cat, dog", ("cat", "dog")), ("labels.txt", "labels.txt")],
)
def test_labels_as_typed(typed: str, labels: object):
    assert load("digits", None, [], True, {"labels": typed}).generation.labels == labels


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
