"""Denoising diffusion implicit models (Song, Meng & Ermon 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from diffusion_core.config import UserError
from diffusion_core.diffusion.config import SamplerConfig, Spacing
from diffusion_core.diffusion.process import GaussianProcess
from diffusion_core.diffusion.samplers.base import Sampler
from diffusion_core.diffusion.schedules import NoiseSchedule


class DDIMSampler(Sampler):
    """Eq. 12: x_s = alpha_s * x0_hat + sqrt(sigma_s**2 - v) * epsilon_hat + sqrt(v) * z, with v of eq. 16.

    v is eta**2 times the posterior variance: eta = 0 is deterministic and never touches the noise, eta = 1 is ancestral
    sampling with the small variance. epsilon_hat is derived from x0_hat as it comes out of the denoiser, so it
    stays consistent with a thresholded one.

    Args:
        eta: share of the ancestral standard deviation, in [0, 1].
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        steps: int,
        spacing: Spacing | str = Spacing.TRAILING,
        times: Sequence[float] | None = None,
        eta: float = 0.0,
    ) -> None:
        super().__init__(schedule, steps, spacing, times)
        if not 0.0 <= eta <= 1.0:
            raise UserError(f"eta: {eta} is not accepted: it must be from 0 to 1.")
        self.eta = eta

    @classmethod
    def from_config(cls, config: SamplerConfig, process: GaussianProcess) -> DDIMSampler:
        return cls(process.schedule, config.steps, config.spacing, eta=config.eta)

    def step(self, x_t: Tensor, x0_hat: Tensor, t: float, s: float, draw: Callable[[], Tensor]) -> Tensor:
        alpha_t, sigma_t = float(self.schedule.alpha(t)), float(self.schedule.sigma(t))
        alpha_s, sigma_s = float(self.schedule.alpha(s)), float(self.schedule.sigma(s))
        variance = 0.0 if self.eta == 0.0 else self.eta**2 * float(self.schedule.transition(s, t).posterior_variance)
        # epsilon_hat = (x_t - alpha_t * x0_hat) / sigma_t, put in.
        noise_scale = math.sqrt(max(sigma_s**2 - variance, 0.0)) / sigma_t
        x_s = (alpha_s - noise_scale * alpha_t) * x0_hat + noise_scale * x_t
        return x_s + math.sqrt(variance) * draw() if variance > 0.0 else x_s
