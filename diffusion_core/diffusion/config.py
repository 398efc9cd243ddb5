"""Configuration of the mathematics: the process that a model is trained with, how it is sampled and guided.

Nothing here imports torch, so that a configuration is validated without waiting for it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from diffusion_core.config import Config


class Choice(StrEnum):
    """An enumeration whose members carry a one-line explanation (`.explanation`), shown in forms and in the help."""

    explanation: str

    def __new__(cls, value: str, explanation: str = "") -> Self:
        member = str.__new__(cls, value)
        member._value_ = value
        member.explanation = explanation
        return member

    @classmethod
    def explained(cls) -> str:
        """All choices with their explanations, as one sentence for a field's description."""
        return "; ".join(f"{member.value}: {member.explanation}" for member in cls) + "."


class ScheduleKind(Choice):
    """How fast an image turns into noise."""

    LINEAR = "linear", "variance grows linearly (Ho et al. 2020), scaled to any number of timesteps"
    COSINE = "cosine", "signal follows a squared cosine, gentler at both ends (Nichol & Dhariwal 2021)"
    QUADRATIC = "quadratic", "the square root of the variance grows linearly, slower at the start than linear"
    SIGMOID = "sigmoid", "variance follows a logistic curve, flat at both ends"


class Prediction(Choice):
    """What the network predicts."""

    EPSILON = "epsilon", "the noise that was added"
    X0 = "x0", "the clean image"
    V = "v", "the velocity alpha * epsilon - sigma * x0 (Salimans & Ho 2022)"


class Variance(Choice):
    """Variance of one ancestral step from t to s."""

    FIXED_SMALL = "fixed_small", "that of the posterior q(x_s | x_t, x_0), right for data of no variance"
    FIXED_LARGE = "fixed_large", "that of the forward step q(x_t | x_s), right for data of unit variance"


class SamplerKind(Choice):
    """How an image is made out of noise."""

    DDPM = "ddpm", "ancestral sampling, noise at every step but the last; best with many steps (Ho et al. 2020)"
    DDIM = "ddim", "deterministic at eta = 0, good from about 20 steps on (Song et al. 2021)"


class Spacing(Choice):
    """Which of the training timesteps are visited by a sampler with fewer steps."""

    TRAILING = "trailing", "evenly from the very last timestep down; always starts at full noise"
    LEADING = "leading", "evenly from timestep 0 up; the last timesteps are not visited"
    LINSPACE = "linspace", "evenly from the last timestep to timestep 0, both included"


class Threshold(Choice):
    """What is done to the predicted clean image at every step, to keep it in the range of images."""

    NONE = "none", "nothing"
    STATIC = "static", "clamped to the range [-1, 1]"
    DYNAMIC = "dynamic", "divided by a quantile of its magnitudes where that exceeds 1 (Saharia et al. 2022)"


class ProcessConfig(Config):
    """The forward process and what the network learns of it."""

    schedule: ScheduleKind = Field(ScheduleKind.COSINE, description=f"Noise schedule. {ScheduleKind.explained()}")
    timesteps: int = Field(1000, ge=2, le=100_000, description="Number of discrete timesteps T of the process.")
    prediction: Prediction = Field(
        Prediction.EPSILON, description=f"What the network predicts. {Prediction.explained()}"
    )
    variance: Variance = Field(
        Variance.FIXED_SMALL, description=f"Variance of an ancestral step. {Variance.explained()}"
    )


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

    @model_validator(mode="after")
    def _eta_belongs_to_ddim(self) -> SamplerConfig:
        if self.kind is not SamplerKind.DDIM and self.eta != 0.0:
            raise ValueError(f"eta is {self.eta}, but only the sampler ddim takes one: leave it at 0 for {self.kind}")
        return self


class GuidanceConfig(Config):
    """Classifier-free guidance (Ho & Salimans 2022): u + scale * (c - u), c with the label and u without."""

    scale: float = Field(
        1.0, ge=0.0, le=100.0, description="Guidance scale: 0 ignores the label, 1 is neutral, more follows it more."
    )
