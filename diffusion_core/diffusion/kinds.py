"""What can be chosen, a line each with its explanation: schedules, predictions, variances, samplers and their options.

`ScheduleKind` and `SamplerKind` are registries: a new schedule or sampler is one new file, and one line here. Nothing
here imports torch, so that the command and the forms know the choices without waiting for it.
"""

from __future__ import annotations

from enum import StrEnum
from importlib import import_module
from typing import Any, Self


class Choice(StrEnum):
    """An enumeration whose members carry a one-line explanation (`.explanation`), shown in forms and in the help.

    Where each member has a file of its own, it names what is there too (`.home`, as "ddim.DDIMSampler"): such an
    enumeration is the registry, of which a command reads the names without importing torch.
    """

    explanation: str
    home: str

    def __new__(cls, value: str, explanation: str = "", home: str = "") -> Self:
        member = str.__new__(cls, value)
        member._value_ = value
        member.explanation = explanation
        member.home = home
        return member

    def load(self, package: str) -> Any:
        """The class or function of this member, out of the package of its kind."""
        module, name = self.home.rsplit(".", 1)
        return getattr(import_module(f"{package}.{module}"), name)

    @classmethod
    def explained(cls) -> str:
        """All choices with their explanations, as one sentence for a field's description."""
        return "; ".join(f"{member.value}: {member.explanation}" for member in cls) + "."


class ScheduleKind(Choice):
    """How fast an image turns into noise: the registry of the package `schedules`.

    A function `..._betas` makes the table of a schedule with timesteps; a class is one of continuous time.
    """

    LINEAR = (
        "linear",
        "variance grows linearly (Ho et al. 2020), scaled to any number of timesteps",
        "discrete.linear_betas",
    )
    SCALED_LINEAR = (
        "scaled_linear",
        "as quadratic, between the bounds of latent diffusion (Rombach et al. 2022)",
        "discrete.scaled_linear_betas",
    )
    COSINE = (
        "cosine",
        "signal follows a squared cosine, gentler at both ends (Nichol & Dhariwal 2021)",
        "discrete.cosine_betas",
    )
    QUADRATIC = (
        "quadratic",
        "the square root of the variance grows linearly, slower at the start than linear",
        "discrete.quadratic_betas",
    )
    SIGMOID = "sigmoid", "variance follows a logistic curve, flat at both ends", "discrete.sigmoid_betas"
    VP = (
        "vp",
        "the variance-preserving SDE, linear in continuous time (Song et al. 2021)",
        "continuous.VPSchedule",
    )
    VE = (
        "ve",
        "the variance-exploding SDE, noise up to sigma_max on an unscaled image (Song et al. 2021)",
        "continuous.VESchedule",
    )
    EDM = (
        "edm",
        "time is the noise level sigma itself, drawn log-normally in training (Karras et al. 2022)",
        "continuous.EDMSchedule",
    )
    FLOW = (
        "flow",
        "straight lines from image to noise: flow matching, rectified flow (Lipman et al. 2023)",
        "continuous.FlowSchedule",
    )

    @property
    def is_discrete(self) -> bool:
        """Whether it is a table of timesteps; the others have continuous time."""
        return self.home.endswith("_betas")


class Prediction(Choice):
    """What the network predicts."""

    EPSILON = "epsilon", "the noise that was added"
    X0 = "x0", "the clean image"
    V = "v", "the velocity alpha * epsilon - sigma * x0 (Salimans & Ho 2022)"
    FLOW = "flow", "the velocity epsilon - x0 of flow matching (Lipman et al. 2023)"
    EDM = "edm", "a mixture of image and noise of unit variance at every noise level (Karras et al. 2022)"


class Variance(Choice):
    """Variance of one ancestral step from t to s."""

    FIXED_SMALL = "fixed_small", "that of the posterior q(x_s | x_t, x_0), right for data of no variance"
    FIXED_LARGE = "fixed_large", "that of the forward step q(x_t | x_s), right for data of unit variance"
    LEARNED_RANGE = (
        "learned_range",
        "between these two, where the network says; trained by the losses hybrid and vlb (Nichol & Dhariwal 2021)",
    )


class SamplerKind(Choice):
    """How an image is made out of noise: the registry of the package `samplers`."""

    DDPM = (
        "ddpm",
        "ancestral sampling, noise at every step but the last; best with many steps (Ho et al. 2020)",
        "ancestral.AncestralSampler",
    )
    DDIM = "ddim", "deterministic at eta = 0, good from about 20 steps on (Song et al. 2021)", "ddim.DDIMSampler"
    EULER = (
        "euler",
        "first order on the probability-flow ODE, with churn if wanted (Karras et al. 2022)",
        "edm.EulerSampler",
    )
    HEUN = "heun", "second order, two evaluations a step, with churn if wanted (Karras et al. 2022)", "edm.HeunSampler"
    DPMPP_2M = (
        "dpmpp_2m",
        "DPM-Solver++ of second order, good from about 15 steps on (Lu et al. 2022)",
        "dpm_solver.DPMSolver2M",
    )
    DPMPP_3M = (
        "dpmpp_3m",
        "DPM-Solver++ of third order, for models without strong guidance (Lu et al. 2022)",
        "dpm_solver.DPMSolver3M",
    )
    DPMPP_2M_SDE = (
        "dpmpp_2m_sde",
        "DPM-Solver++ of second order with noise at every step (Lu et al. 2022)",
        "dpm_solver.DPMSolver2MSDE",
    )
    DPMPP_3M_SDE = (
        "dpmpp_3m_sde",
        "DPM-Solver++ of third order with noise at every step (Lu et al. 2022)",
        "dpm_solver.DPMSolver3MSDE",
    )
    UNIPC = (
        "unipc",
        "predictor and corrector of any order, good from about 10 steps on (Zhao et al. 2023)",
        "unipc.UniPCSampler",
    )
    PREDICTOR_CORRECTOR = (
        "predictor_corrector",
        "ancestral steps with Langevin corrections in between, slow and robust (Song et al. 2021)",
        "predictor_corrector.PredictorCorrectorSampler",
    )


class Spacing(Choice):
    """Which of the training timesteps are visited by a sampler with fewer steps."""

    TRAILING = "trailing", "evenly from the very last timestep down; always starts at full noise"
    LEADING = "leading", "evenly from timestep 0 up; the last timesteps are not visited"
    LINSPACE = "linspace", "evenly from the last timestep to timestep 0, both included"
    KARRAS = "karras", "densely at low noise: sigma / alpha to the power 1 / rho falls evenly (Karras et al. 2022)"


class Threshold(Choice):
    """What is done to the predicted clean image at every step, to keep it in the range of images."""

    NONE = "none", "nothing"
    STATIC = "static", "clamped to the range [-1, 1]"
    DYNAMIC = "dynamic", "divided by a quantile of its magnitudes where that exceeds 1 (Saharia et al. 2022)"
