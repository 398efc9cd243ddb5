"""Configuration of the mathematics: light to import, explained to the user, and complete in what it names."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from pydantic import ValidationError

import diffusion_core.diffusion as room
from diffusion_core.config import Config, UserError, digest, explain
from diffusion_core.diffusion import (
    GuidanceConfig,
    ProcessConfig,
    SamplerConfig,
    build_sampler,
    make_process,
    make_sampler,
    make_schedule,
)
from diffusion_core.diffusion.config import check_sampler
from diffusion_core.diffusion.kinds import Choice, Prediction, SamplerKind, ScheduleKind, Spacing, Threshold, Variance
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


def test_options_of_samplers_are_parameters_of_their_classes() -> None:
    """A configuration's options reach the sampler by name, so every name must be known there."""
    for kind in SamplerKind:
        for spacing in Spacing:
            config = SamplerConfig(kind=kind, steps=4, spacing=spacing)
            sampler = build_sampler(config, make_process(ProcessConfig()))
            assert len(sampler.times) == 4
            options = {name: value for name, value in config.options().items() if name not in ("spacing", "rho")}
            assert make_sampler(kind, make_schedule("linear"), 4, **options)


@pytest.mark.parametrize(
    ("fields", "attribute", "value"),
    [
        ({"kind": "heun", "churn": 2.0, "churn_max": 50}, "churn_range", (0.0, 50.0)),
        ({"kind": "euler", "churn": 0.4}, "raised_by", 0.1),
        ({"kind": "unipc", "order": 3}, "order", 3),
        ({"kind": "predictor_corrector", "corrector_snr": 0.3}, "corrector_snr", 0.3),
        ({"kind": "predictor_corrector", "corrector_steps": 2}, "evaluations", 10),
    ],
)
def test_options_reach_the_sampler(fields: dict[str, object], attribute: str, value: object) -> None:
    config = SamplerConfig.model_validate({"steps": 4, **fields})
    assert getattr(build_sampler(config, make_process(ProcessConfig())), attribute) == value


@pytest.mark.parametrize(
    ("config", "fields", "words"),
    [
        (SamplerConfig, {"kind": "ddim", "churn": 1}, "churn is 1.0, but only the samplers euler and heun take it"),
        (SamplerConfig, {"kind": "heun", "order": 3}, "order is 3, but only the sampler unipc takes it"),
        (SamplerConfig, {"kind": "ddpm", "corrector_snr": 0.3}, "only the sampler predictor_corrector takes it"),
        (SamplerConfig, {"rho": 3}, "rho is 3.0, but only the spacing karras takes it"),
        (SamplerConfig, {"kind": "heun", "churn_min": 2, "churn_max": 1}, "churn_max 1.0 must be above churn_min"),
        (
            ProcessConfig,
            {"schedule": "linear", "rescale_zero_terminal_snr": True},
            "rescale_zero_terminal_snr is not accepted with the prediction epsilon",
        ),
        (ProcessConfig, {"schedule": "vp", "prediction": "v", "rescale_zero_terminal_snr": True}, "with timesteps"),
        (ProcessConfig, {"schedule": "flow"}, "prediction epsilon is not accepted with the schedule flow"),
        (ProcessConfig, {"schedule": "edm", "prediction": "v"}, "prediction v is not accepted with the schedule edm"),
        (ProcessConfig, {"schedule": "vp", "variance": "learned_range"}, "learned_range is for the schedules with"),
        (ProcessConfig, {"sigma_max": 50}, "sigma_max is for the schedules ve and edm only"),
        (ProcessConfig, {"sigma_data": 0.3}, "sigma_data is for the prediction edm only"),
        (GuidanceConfig, {"min_log_snr": 2, "max_log_snr": 1}, "min_log_snr 2.0 must be below max_log_snr"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(config: type[Config], fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config.model_validate(fields)
    assert words in explain(caught.value)


def test_a_sampler_that_does_not_suit_the_process_is_one_sentence() -> None:
    flow = ProcessConfig.model_validate({"schedule": "flow", "prediction": "flow", "timesteps": 100})
    with pytest.raises(UserError, match=r"a\.sampler\.steps: 200 is more than the 100 timesteps"):
        check_sampler("a.sampler", SamplerConfig(steps=200), flow)
    with pytest.raises(UserError, match=r"a\.sampler\.spacing: karras is not accepted"):
        check_sampler("a.sampler", SamplerConfig(spacing=Spacing.KARRAS), flow)
    check_sampler("a.sampler", SamplerConfig(steps=100), flow)


def test_options_of_the_process_reach_its_schedule() -> None:
    edm = make_process(ProcessConfig.model_validate({"schedule": "edm", "prediction": "edm", "sigma_max": 40}))
    assert (edm.schedule.t_min, edm.schedule.t_max, edm.sigma_data) == (0.002, 40.0, 0.5)
    zero = make_process(ProcessConfig.model_validate({"prediction": "v", "rescale_zero_terminal_snr": True}))
    assert zero.schedule.ends_in_pure_noise


def test_ids_of_what_was_made_before_the_new_fields_stay() -> None:
    """Digests of the first release: a field that came later must not change them at its default."""
    assert digest(ProcessConfig()) == "73ef7215c7d58555"
    assert digest(SamplerConfig()) == "df00ac99bc2dc360"
    assert digest(GuidanceConfig(scale=2)) == "6cc27f2f343ca758"
    assert digest(SamplerConfig(kind=SamplerKind.DDPM, steps=3)) == "d4af1695e20b59d0"
    assert digest(GuidanceConfig(scale=2, rescale=0.5)) != digest(GuidanceConfig(scale=2))


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
        (SamplerConfig, {"kind": "unipc", "order": 4}),
        (GuidanceConfig, {"rescale": 1.5}),
        (GuidanceConfig, {"scale": -1.0}),
        (GuidanceConfig, {"scale": float("nan")}),
    ],
)
def test_impossible_values_are_refused(config: type[Config], fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        config.model_validate(fields)
