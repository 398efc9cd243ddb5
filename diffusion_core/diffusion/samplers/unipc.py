"""UniPC, a unified predictor and corrector of any order (Zhao et al. 2023, arXiv 2302.04867)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from diffusion_core.config import UserError
from diffusion_core.diffusion.samplers.base import Move, Sampler
from diffusion_core.diffusion.schedules import NoiseSchedule


class UniPCSampler(Sampler):
    """UniPC-p with B(h) = exp(h) - 1 (B_2) on x0_hat (algorithms 1 and 2): one evaluation a step.

    A step first corrects x_t (UniC-p), now that x0_hat at its time is known, and then predicts x_s (UniP-p) with that
    same x0_hat. The corrector raises the order by one. Towards the end the order is lowered, as in the authors' code.

    Args:
        order: p, from 1 to 3.
        grid: which times are visited, as in `Sampler`.
    """

    memory: ClassVar[int] = 3

    def __init__(self, schedule: NoiseSchedule, steps: int, *, order: int = 2, **grid: Any) -> None:
        super().__init__(schedule, steps, **grid)
        if not 1 <= order <= 3:
            raise UserError(f"order: {order} is not accepted: it must be from 1 to 3.")
        self.order = order

    def step(self, move: Move) -> Tensor:
        x0_hat = move.x0_hat  # at the predicted x_t: it is not asked for again
        if move.last:
            return x0_hat
        if move.past and self._order(move.past[0], move.past[1:]):
            before, *earlier = move.past
            order = self._order(before, earlier)  # as it was predicted with
            move.x_t = self._advance(before, earlier[: order - 1], move.t, x0_hat)
        order = self._order(move, move.past)
        return self._advance(move, move.past[: max(order, 1) - 1], move.s, None)

    def _order(self, move: Move, earlier: Sequence[Move]) -> int:
        """The order of the step of `move`, knowing those `earlier`; 0 if it begins in pure noise, at lambda = -inf."""
        known = sum(math.isfinite(self.level(one.t).lam) for one in (move, *earlier))
        return min(self.order, known, move.steps - move.index)

    def _advance(self, move: Move, earlier: Sequence[Move], s: float, x0_s: Tensor | None) -> Tensor:
        """x_s from x_t of `move` and its estimate, those of the moves before, and that at s itself (corrector).

        sigma_s / sigma_t * x_t + alpha_s * (1 - exp(-h)) * (m_0 + sum of a_i * (m_i - m_0) / r_i), with r_i =
        (lambda_i - lambda_t) / h: eq. 3 (UniC) in its form for x0_hat, and without the term at s that of UniP (section
        3.2).
        """
        from_, to = self.level(move.t), self.level(s)
        width = to.lam - from_.lam
        ratios = [(self.level(one.t).lam - from_.lam) / width for one in earlier]
        estimates = [one.x0_hat for one in earlier]
        if x0_s is not None:
            ratios, estimates = [*ratios, 1.0], [*estimates, x0_s]
        mean = move.x0_hat
        if ratios:
            for weight, ratio, estimate in zip(_weights(ratios, width), ratios, estimates, strict=True):
                mean = mean + (weight / ratio) * (estimate - move.x0_hat)
        return (to.sigma / from_.sigma) * move.x_t + (to.alpha * -math.expm1(-width)) * mean


def _weights(ratios: list[float], width: float) -> list[float]:
    """a of R a = b with R_ki = r_i**(k-1) (theorem 3.1), so that polynomials in lambda are integrated without error.

    b_k = k! * phi_{k+1}(-h) * (-h) / (exp(-h) - 1). A single weight is 1 / 2 whatever h, which leaves the order as it
    is (their remark on p = 1 and 2).
    """
    if len(ratios) == 1:
        return [0.5]
    z = -width
    scale = z / math.expm1(z)
    right = [math.factorial(k) * _phi(k + 1, z) * scale for k in range(1, len(ratios) + 1)]
    return [float(a) for a in np.linalg.solve(np.vander(ratios, increasing=True).T, right)]


def _phi(k: int, z: float) -> float:
    """phi_k(z) = sum over n of z**n / (n + k)!"""
    if abs(z) < 1.0:  # the recursion loses digits there
        return sum(z**n / math.factorial(n + k) for n in range(20))
    value = math.expm1(z) / z
    for n in range(1, k):
        value = (value - 1.0 / math.factorial(n)) / z
    return value
