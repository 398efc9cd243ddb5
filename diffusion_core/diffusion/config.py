"""Configuration of the mathematics: the process that a model is trained with, how it is sampled and guided.

Nothing here imports torch, so that a configuration is validated without waiting for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, model_validator

from diffusion_core.config import Config, UserError, execution, later
from diffusion_core.diffusion.kinds import Prediction, SamplerKind, ScheduleKind, Spacing, Threshold, Variance


class ProcessConfig(Config):
    """The forward process and what the network learns of it."""

    schedule: ScheduleKind = Field(ScheduleKind.COSINE, description=f"Noise schedule. {ScheduleKind.explained()}")
    timesteps: int = Field(
        1000,
        ge=2,
        le=100_000,
        description="Number of timesteps T of the process; in continuous time its finest division, so that the least "
        "time is 1 / T of the whole. A sampler takes at most T steps.",
    )
    prediction: Prediction = Field(
        Prediction.EPSILON, description=f"What the network predicts. {Prediction.explained()}"
    )
    variance: Variance = Field(
        Variance.FIXED_SMALL, description=f"Variance of an ancestral step. {Variance.explained()}"
    )
    rescale_zero_terminal_snr: bool = later(
        False,
        description="Discrete schedules only: shift and scale the signal so that none is left at the last timestep "
        "(Lin et al. 2024). Not with the prediction epsilon.",
    )
    sigma_min: float | None = later(
        None, gt=0, le=1, description="Schedules ve and edm only: least noise. Default: 0.01 of ve, 0.002 of edm."
    )
    sigma_max: float | None = later(
        None, gt=1, le=1e5, description="Schedules ve and edm only: greatest noise. Default: 50 of ve, 80 of edm."
    )
    sigma_data: float = later(
        0.5, gt=0, le=10, description="Prediction edm only: standard deviation of the images, whose range is [-1, 1]."
    )

    @model_validator(mode="after")
    def _options_belong_to_the_schedule(self) -> ProcessConfig:
        exploding = self.schedule in (ScheduleKind.VE, ScheduleKind.EDM)
        if self.rescale_zero_terminal_snr and not self.schedule.is_discrete:
            raise ValueError(
                f"rescale_zero_terminal_snr is for the schedules with timesteps: leave it off for {self.schedule}"
            )
        for name in ("sigma_min", "sigma_max"):
            if getattr(self, name) is not None and not exploding:
                raise ValueError(f"{name} is for the schedules ve and edm only: leave it out for {self.schedule}")
        if self.variance is Variance.LEARNED_RANGE and not self.schedule.is_discrete:
            raise ValueError(
                f"variance learned_range is for the schedules with timesteps: choose fixed_small for {self.schedule}"
            )
        if self.sigma_data != 0.5 and self.prediction is not Prediction.EDM:
            raise ValueError(f"sigma_data is for the prediction edm only: leave it at 0.5 for {self.prediction}")
        return self

    @model_validator(mode="after")
    def _prediction_suits_the_schedule(self) -> ProcessConfig:
        if self.prediction is Prediction.EPSILON and self.rescale_zero_terminal_snr:
            raise ValueError(
                "rescale_zero_terminal_snr is not accepted with the prediction epsilon, since no image follows from "
                "the noise where there is nothing else: choose v, x0, flow or edm"
            )
        if self.prediction is Prediction.EPSILON and self.schedule is ScheduleKind.FLOW:
            raise ValueError(
                "prediction epsilon is not accepted with the schedule flow, since no image follows from the noise "
                "where there is nothing else: choose flow, v, x0 or edm"
            )
        exploding = self.schedule in (ScheduleKind.VE, ScheduleKind.EDM)
        if self.prediction in (Prediction.V, Prediction.FLOW) and exploding:
            raise ValueError(
                f"prediction {self.prediction} is not accepted with the schedule {self.schedule}, under which it grows "
                "with the noise: choose edm, epsilon or x0"
            )
        return self

    def output_channels(self, channels: int) -> int:
        """Channels of a network's output for images of so many: twice them where it tells the variance too."""
        return 2 * channels if self.variance is Variance.LEARNED_RANGE else channels

    def schedule_options(self) -> dict[str, Any]:
        """What `make_schedule` is told besides kind and timesteps."""
        options: dict[str, Any] = {
            name: getattr(self, name) for name in ("sigma_min", "sigma_max") if getattr(self, name) is not None
        }
        return {**options, "rescale_zero_terminal_snr": True} if self.rescale_zero_terminal_snr else options


_CHURNED = (SamplerKind.EULER, SamplerKind.HEUN)
# Options of a sampler by the kinds that take them; each is a parameter of the sampler's class by the same name.
_TAKEN_BY: dict[str, tuple[SamplerKind, ...]] = {
    "eta": (SamplerKind.DDIM,),
    "churn": _CHURNED,
    "churn_min": _CHURNED,
    "churn_max": _CHURNED,
    "churn_noise": _CHURNED,
    "order": (SamplerKind.UNIPC,),
    "corrector_steps": (SamplerKind.PREDICTOR_CORRECTOR,),
    "corrector_snr": (SamplerKind.PREDICTOR_CORRECTOR,),
}


class SamplerConfig(Config):
    """How images are drawn from a trained model."""

    kind: SamplerKind = Field(SamplerKind.DDIM, description=f"Sampler. {SamplerKind.explained()}")
    steps: int = Field(
        50, ge=1, le=100_000, description="Number of sampler steps, at most the number of timesteps of the process."
    )
    eta: float = Field(
        0.0, ge=0.0, le=1.0, description="DDIM only: noise per step, from 0 (none) to 1 (as ancestral sampling)."
    )
    spacing: Spacing = Field(Spacing.TRAILING, description=f"Timesteps that are visited. {Spacing.explained()}")
    threshold: Threshold = Field(
        Threshold.STATIC, description=f"Range of the predicted clean image. {Threshold.explained()}"
    )
    threshold_quantile: float = Field(
        0.995, gt=0.0, le=1.0, description="Dynamic threshold only: the quantile of the magnitudes of each image."
    )
    rho: float = later(7.0, ge=1.0, le=100.0, description="Karras spacing only: the higher, the more low-noise steps.")
    churn: float = later(
        0.0,
        ge=0.0,
        le=1000.0,
        description="Euler and Heun only: noise that is added, spread over all steps (S_churn of Karras et al. 2022).",
    )
    churn_min: float = later(
        0.0, ge=0.0, le=1e6, description="Churn only: least sigma / alpha at which noise is added."
    )
    churn_max: float | None = later(
        None, gt=0.0, le=1e6, description="Churn only: greatest sigma / alpha at which noise is added; none: no limit."
    )
    churn_noise: float = later(
        1.0, ge=0.5, le=2.0, description="Churn only: standard deviation of the noise, slightly above 1 keeps detail."
    )
    order: int = later(2, ge=1, le=3, description="UniPC only: order of the predictor; the corrector adds one.")
    corrector_steps: int = later(
        1, ge=1, le=100, description="Predictor-corrector only: Langevin corrections before each step but the first."
    )
    corrector_snr: float = later(
        0.16, gt=0.0, le=1.0, description="Predictor-corrector only: signal-to-noise ratio of a Langevin correction."
    )

    @model_validator(mode="after")
    def _options_belong_to_the_sampler(self) -> SamplerConfig:
        for name, kinds in _TAKEN_BY.items():
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default and self.kind not in kinds:
                takers = f"sampler {kinds[0]} takes" if len(kinds) == 1 else f"samplers {' and '.join(kinds)} take"
                raise ValueError(f"{name} is {value}, but only the {takers} it: leave it at {default} for {self.kind}")
        if self.rho != 7.0 and self.spacing is not Spacing.KARRAS:
            raise ValueError(
                f"rho is {self.rho}, but only the spacing karras takes it: leave it at 7 for {self.spacing}"
            )
        if self.churn_max is not None and self.churn_max <= self.churn_min:
            raise ValueError(f"churn_max {self.churn_max} must be above churn_min, which is {self.churn_min}")
        return self

    def options(self) -> dict[str, Any]:
        """What the class of this kind of sampler is told besides schedule and steps."""
        taken = {name: getattr(self, name) for name, kinds in _TAKEN_BY.items() if self.kind in kinds}
        return {"spacing": self.spacing, "rho": self.rho, **taken}


def check_sampler(field: str, sampler: SamplerConfig, process: ProcessConfig) -> None:
    """A sampler suits the process that a model was trained with.

    Args:
        field: path of the sampler's configuration, for the message.

    Raises:
        UserError: more steps than timesteps, or a spacing that the schedule does not have.
    """
    if sampler.steps > process.timesteps:
        raise UserError(
            f"{field}.steps: {sampler.steps} is more than the {process.timesteps} timesteps of the model's process."
        )
    ends_in_noise = process.rescale_zero_terminal_snr or process.schedule is ScheduleKind.FLOW
    if sampler.spacing is Spacing.KARRAS and ends_in_noise:
        raise UserError(
            f"{field}.spacing: karras is not accepted for a model whose process ends in pure noise, where "
            "sigma / alpha is infinite: choose trailing, leading or linspace."
        )


def check_guidance_scale(field: str, guidance: GuidanceConfig, class_names: Sequence[str]) -> None:
    """Guidance by leaving out the label needs labels. `UserError` naming the scale, for a model without classes."""
    if guidance.scale != 1 and not guidance.guide and not class_names:
        raise UserError(
            f"{field}.scale: {guidance.scale:g} is not accepted for a model without classes, which takes only 1, or a "
            "guide."
        )


class GuidanceConfig(Config):
    """Guidance u + scale * (c - u), away from a weaker prediction u.

    c is that of the model, with the label; u is the model's own without it (classifier-free guidance, Ho & Salimans
    2022), or that of a weaker model, the guide (autoguidance, Karras et al. 2024). A classifier may guide as well.
    """

    scale: float = Field(
        1.0, ge=0.0, le=100.0, description="Guidance scale: 0 ignores the label, 1 is neutral, more follows it more."
    )
    guide: str | None = execution(
        None,
        min_length=1,
        description="Autoguidance: name@alias, run or bundle of a weaker model of the same images and process, "
        "as a smaller or less trained one, to guide away from instead of leaving the label out. The digest of that "
        "bundle, not its name, is part of the ids of what it guides.",
    )
    classifier: str | None = execution(
        None,
        min_length=1,
        description="Classifier guidance: name@alias, run or bundle of a classifier of noisy images, trained "
        "with network.kind classifier and the same process. Its digest, not its name, is part of the ids of what it "
        "guides.",
    )
    classifier_scale: float = later(
        0.0,
        ge=0.0,
        le=1000.0,
        description="Classifier guidance (Dhariwal & Nichol 2021): weight of the gradient of log p(label | x_t); 0 is "
        "neutral. It adds to what the scale does.",
    )
    rescale: float = later(
        0.0,
        ge=0.0,
        le=1.0,
        description="Share by which the guided output is brought back to the standard deviation of the one with the "
        "label (Lin et al. 2024), against overexposure at high scales; they use 0.7.",
    )
    min_log_snr: float | None = later(
        None,
        ge=-100.0,
        le=100.0,
        description="Guide only where log(alpha^2 / sigma^2) is at least this (Kynkäänniemi et al. 2024: sigma_hi = "
        "exp(-min_log_snr / 2)); at more noise the scale is 1. None: from the start on.",
    )
    max_log_snr: float | None = later(
        None,
        ge=-100.0,
        le=100.0,
        description="Guide only where log(alpha^2 / sigma^2) is at most this (sigma_lo = exp(-max_log_snr / 2)); at "
        "less noise the scale is 1. None: to the end.",
    )

    @model_validator(mode="after")
    def _interval_is_not_empty(self) -> GuidanceConfig:
        low, high = self.min_log_snr, self.max_log_snr
        if low is not None and high is not None and low >= high:
            raise ValueError(f"min_log_snr {low} must be below max_log_snr, which is {high}")
        return self

    @model_validator(mode="after")
    def _there_is_a_classifier(self) -> GuidanceConfig:
        if self.classifier_scale and not self.classifier:
            raise ValueError(f"classifier_scale is {self.classifier_scale:g}, which needs a classifier to be named")
        return self

    @property
    def models(self) -> dict[str, str]:
        """References of the other models that take part, by the name of their field: those that are not neutral."""
        guide = {"guide": self.guide} if self.guide and self.scale != 1.0 else {}
        return {**guide, **({"classifier": self.classifier} if self.classifier and self.classifier_scale else {})}
