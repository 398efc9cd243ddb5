"""Configuration of the mathematics: light to import, explained to the user, and complete in what it names."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from pydantic import ValidationError

import diffusion_core.diffusion as room
from diffusion_core.config import Config
from diffusion_core.diffusion import GuidanceConfig, ProcessConfig, SamplerConfig, make_sampler, make_schedule
from diffusion_core.diffusion.config import Choice, Prediction, SamplerKind, ScheduleKind, Spacing, Threshold, Variance
from diffusion_core.networks import UNetConfig


def test_configurations_are_validated_without_torch() -> None:
    code = (
        "import sys; from diffusion_core.diffusion import ProcessConfig; from diffusion_core.networks import "
        "UNetConfig, check_image_size; ProcessConfig(); check_image_size(UNetConfig(), 8, 8); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there() -> None:
    for name in room.__all__:
        assert getattr(room, name) is not None
    assert set(room.__all__) <= set(dir(room))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        getattr(room, "Nothing")  # noqa: B009 - the name must stay a string for the type checker
    networks = importlib.import_module("diffusion_core.networks")
    assert all(getattr(networks, name) is not None for name in networks.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        networks.Nothing  # noqa: B018


@pytest.mark.parametrize("config", [ProcessConfig, SamplerConfig, GuidanceConfig, UNetConfig])
def test_every_field_has_a_description_and_a_default(config: type[Config]) -> None:
    config()
    for name, field in config.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize("choice", [ScheduleKind, Prediction, Variance, SamplerKind, Spacing, Threshold])
def test_choices_explain_themselves_and_are_their_values(choice: type[Choice]) -> None:
    for member in choice:
        assert member.explanation
        assert f"{member.value}: {member.explanation}" in choice.explained()
        assert choice(member.value) is member
        assert f"{member}" == member.value


def test_every_choice_of_schedule_and_sampler_exists() -> None:
    for schedule in ScheduleKind:
        for sampler in SamplerKind:
            assert len(make_sampler(sampler, make_schedule(schedule, 20), 5).times) == 5


def test_configurations_survive_json() -> None:
    for config in (
        ProcessConfig.model_validate({"schedule": "sigmoid", "prediction": "v"}),
        SamplerConfig.model_validate({"kind": "ddpm", "steps": 250, "spacing": "linspace"}),
        UNetConfig.model_validate({"channel_multipliers": [1, 2], "attention_resolutions": [4]}),
    ):
        assert type(config).model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (ProcessConfig, {"schedule": "cubic"}),
        (ProcessConfig, {"timesteps": 1}),
        (ProcessConfig, {"beta_start": 0.1}),
        (SamplerConfig, {"steps": 0}),
        (SamplerConfig, {"eta": 1.1}),
        (SamplerConfig, {"kind": "ddpm", "eta": 0.5}),
        (SamplerConfig, {"threshold_quantile": 0.0}),
        (GuidanceConfig, {"scale": -1.0}),
        (GuidanceConfig, {"scale": float("nan")}),
    ],
)
def test_impossible_values_are_refused(config: type[Config], fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        config.model_validate(fields)
