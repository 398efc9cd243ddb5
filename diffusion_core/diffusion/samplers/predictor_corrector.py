"""Predictor-corrector sampling: ancestral steps, and Langevin dynamics on the score in between (Song et al. 2021)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from diffusion_core.config import UserError
from diffusion_core.diffusion.samplers.ancestral import AncestralSampler
from diffusion_core.diffusion.samplers.base import Move
from diffusion_core.diffusion.schedules import NoiseSchedule


class PredictorCorrectorSampler(AncestralSampler):
    """Algorithm 1 with the ancestral predictor and the Langevin corrector (algorithms 4 and 5).

    After each step but the last, which ends at a clean image: `corrector_steps` times x + e * g + sqrt(2e) * z with the
    score g = (alpha * x0_hat - x) / sigma**2 and e = 2a * (r * |z| / |g|)**2. Their a is 1 (VE) or 1 - beta_t (VP, with
    a thousand timesteps); it is 1 here, as steps may be wide. The norms are those of each image and not means over a
    batch as in their code: an image must not depend on its neighbours.

    Args:
        corrector_steps: M, corrections after each step.
        corrector_snr: r, the signal-to-noise ratio of a correction.
        others: as of `AncestralSampler`.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        steps: int,
        *,
        corrector_steps: int = 1,
        corrector_snr: float = 0.16,
        **others: Any,
    ) -> None:
        super().__init__(schedule, steps, **others)
        if corrector_steps < 1 or corrector_snr <= 0.0:
            raise UserError(
                f"corrector_steps: {corrector_steps} with corrector_snr {corrector_snr} is not accepted: at least 1 "
                "correction and a ratio above 0 are needed."
            )
        self.corrector_steps, self.corrector_snr = corrector_steps, corrector_snr

    @property
    def evaluations(self) -> int:
        steps = len(self.intervals)
        return steps + self.corrector_steps * (steps - 1)

    def step(self, move: Move) -> Tensor:
        if move.index > 0:  # corrections of what the step before has made
            for _ in range(self.corrector_steps):
                move.x_t = self._corrected(move)
        return super().step(move)

    def _corrected(self, move: Move) -> Tensor:
        alpha, sigma, _ = self.level(move.t)
        x, z = move.x_t, move.draw()
        score = (alpha * move.evaluate(x, move.t) - x) / sigma**2
        size = 2.0 * (self.corrector_snr * _norm(z) / _norm(score)).square()
        return x + size * score + torch.sqrt(2.0 * size) * z


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm of each image, (N, 1, ..., 1), and never 0."""
    norm = torch.linalg.vector_norm(x.flatten(1), dim=1).clamp(min=math.sqrt(torch.finfo(x.dtype).tiny))
    return norm.reshape(-1, *(1,) * (x.ndim - 1))
