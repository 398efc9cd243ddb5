"""Denoising diffusion implicit models (Song, Meng & Ermon 2020)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from diffusion_core.config import UserError
from diffusion_core.diffusion.samplers.base import Denoise, Move, Sampler
from diffusion_core.diffusion.schedules import NoiseSchedule


class DDIMSampler(Sampler):
    """Eq. 12: x_s = alpha_s * x0_hat + sqrt(sigma_s**2 - v) * epsilon_hat + sqrt(v) * z, with v of eq. 16.

    v is eta**2 times the posterior variance: eta = 0 is deterministic and never touches the noise, eta = 1 is ancestral
    sampling with the small variance. epsilon_hat is derived from x0_hat as it comes out of the denoiser, so it
    stays consistent with a thresholded one.

    Args:
        eta: share of the ancestral standard deviation, in [0, 1].
        grid: which times are visited, as in `Sampler`.
    """

    def __init__(self, schedule: NoiseSchedule, steps: int, *, eta: float = 0.0, **grid: Any) -> None:
        super().__init__(schedule, steps, **grid)
        if not 0.0 <= eta <= 1.0:
            raise UserError(f"eta: {eta} is not accepted: it must be from 0 to 1.")
        self.eta = eta

    def step(self, move: Move) -> Tensor:
        (alpha_t, sigma_t, _), (alpha_s, sigma_s, _) = self.level(move.t), self.level(move.s)
        variance = 0.0
        if self.eta > 0.0:
            variance = self.eta**2 * float(self.schedule.transition(move.s, move.t).posterior_variance)
        # epsilon_hat = (x_t - alpha_t * x0_hat) / sigma_t, put in.
        noise_scale = math.sqrt(max(sigma_s**2 - variance, 0.0)) / sigma_t
        x_s = (alpha_s - noise_scale * alpha_t) * move.x0_hat + noise_scale * move.x_t
        return x_s + math.sqrt(variance) * move.draw() if variance > 0.0 else x_s

    @torch.no_grad()
    def invert(self, denoiser: Denoise, x0: Tensor, iterations: int = 1) -> Tensor:
        """The noise x_T from which `sample` with eta = 0 makes the images x0: the steps backwards (section 4.3).

        The step from s up to t takes the estimates at (x_t, t), which is what is being looked for; epsilon_hat is first
        taken at (x_s, t), which makes an error of the order of the step. Each further iteration puts the x_t so found
        in (Pan et al. 2023, "AIDI"), and shrinks the error of the round trip as long as steps are small.

        Args:
            denoiser: (x_t, t) -> x0_hat; a thresholding one forgets what it cut off.
            x0: (N, C, H, W) images in [-1, 1].
            iterations: evaluations of each step.

        Returns:
            (N, C, H, W) in the dtype of x0, but at least float32, at the scale of standard normal noise, as `sample`
            takes it.

        Raises:
            UserError: for a sampler with noise, which cannot be inverted.
        """
        if self.eta != 0.0:
            raise UserError(f"eta: {self.eta} is not accepted for an inversion: sampling must be deterministic, eta 0.")
        x = x0 if x0.dtype.itemsize >= 4 else x0.float()
        for t, s in reversed(self.intervals):
            (alpha_t, sigma_t, _), (alpha_s, sigma_s, _) = self.level(t), self.level(s)
            x_t = x
            for iteration in range(iterations):
                x0_hat = denoiser(x_t, t)
                in_noise = alpha_t * alpha_s < sigma_t * sigma_s
                if alpha_t == 0.0 or (in_noise and iteration > 0):  # there x0_hat depends less on x_t than epsilon does
                    x_t = sigma_t / sigma_s * x - (sigma_t / sigma_s * alpha_s - alpha_t) * x0_hat
                else:
                    epsilon = (x_t - alpha_t * x0_hat) / sigma_t
                    x_t = alpha_t / alpha_s * x + (sigma_t - alpha_t / alpha_s * sigma_s) * epsilon
            x = x_t
        return x / self.schedule.prior_scale(self.times[0])
