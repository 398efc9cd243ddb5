"""DPM-Solver++, multistep, of second and third order, as ODE and as SDE (Lu et al. 2022, arXiv 2211.01095)."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from diffusion_core.diffusion.samplers.base import Level, Move, Sampler

# Below this many steps the order is lowered towards the end, as in the authors' code, which keeps few steps stable.
FEW_STEPS = 15


class DPMSolver2M(Sampler):
    """DPM-Solver++(2M) (algorithm 2): the ODE in lambda = log(alpha / sigma), with x0_hat as a polynomial in lambda.

    x_s = sigma_s / sigma_t * x_t + alpha_s * integral of exp(lambda - lambda_s) * x0_hat(lambda) from lambda_t to
    lambda_s (proposition 4.1), the polynomial going through the estimates of this move and those before. The first
    steps have only what there is: so the third order, started from nothing, keeps an overall order of 2.

    Attributes:
        order: estimates in the polynomial.
        stochastic: the reverse SDE instead of the ODE; then the integrand decays as exp(2 * (lambda - lambda_s)).
    """

    memory: ClassVar[int] = 1
    order: ClassVar[int] = 2
    stochastic: ClassVar[bool] = False

    def step(self, move: Move) -> Tensor:
        if move.last:
            return move.x0_hat
        t, s = self.level(move.t), self.level(move.s)
        width = s.lam - t.lam  # infinite if the move begins in pure noise
        x_s = (s.sigma / t.sigma * (math.exp(-width) if self.stochastic else 1.0)) * move.x_t
        terms = self._differences(move, width)
        weights = self._weights(2.0 * width if self.stochastic else width, len(terms))
        for weight, term in zip(weights, terms, strict=True):
            x_s = x_s + (s.alpha * weight) * term
        return x_s + _deviation(t, s) * move.draw() if self.stochastic else x_s

    def _differences(self, move: Move, width: float) -> list[Tensor]:
        """x0_hat and, as far as the order goes, h * x0' and h**2 * x0'' / 2, by divided differences; h is the width."""
        lam = [self.level(one.t).lam for one in (move, *move.past)]
        m = [move.x0_hat, *(one.x0_hat for one in move.past)]
        order = min(self.order, sum(map(math.isfinite, lam)))  # pure noise, at -inf, tells nothing of a derivative
        if move.steps < FEW_STEPS:
            order = min(order, move.steps - move.index)
        if order <= 1:
            return m[:1]
        r_0 = (lam[0] - lam[1]) / width
        slope = (m[0] - m[1]) / r_0
        if order == 2:
            return [m[0], slope]
        r_1 = (lam[1] - lam[2]) / width
        bend = (slope - (m[1] - m[2]) / r_1) / (r_0 + r_1)
        return [m[0], slope + r_0 * bend, bend]

    def _weights(self, z: float, order: int) -> list[float]:
        """Integrals of z * exp(-z * (1 - v)) * v**n over v from 0 to 1, for n = 0 … order - 1.

        Up to the second order the integral of v is replaced by half of that of 1, as in algorithm 2: it is the same up
        to a term of the next order. The third order needs it exactly.
        """
        whole = -math.expm1(-z)
        return [whole, 0.5 * whole][:order] if order < 3 else [_integral(n, z) for n in range(order)]


class DPMSolver3M(DPMSolver2M):
    """Third order: the polynomial through three estimates is integrated exactly.

    The authors' code, and what took it over, has half of the last term: see `test_solvers.py`, which shows that it is
    of lower order for it.
    """

    memory = 2
    order = 3


class DPMSolver2MSDE(DPMSolver2M):
    """SDE-DPM-Solver++(2M): the noise of a step is that of ancestral sampling, the mean of second order in x0_hat."""

    stochastic = True


class DPMSolver3MSDE(DPMSolver3M):
    """The same with a mean of third order in x0_hat."""

    stochastic = True


def _deviation(t: Level, s: Level) -> float:
    """Of the noise in a step of the SDE: sigma_s * sqrt(1 - exp(-2h)), the posterior's."""
    return s.sigma * math.sqrt(-math.expm1(-2.0 * (s.lam - t.lam)))


def _integral(power: int, z: float) -> float:
    """Integral of z * exp(-z * (1 - v)) * v**power over v from 0 to 1."""
    if z < 0.5:  # the recursion below loses digits where its series is quick
        term, total = z / (power + 1), 0.0
        for k in range(1, 20):
            total += term
            term *= -z / (power + 1 + k)
        return total
    value = -math.expm1(-z)
    for n in range(1, power + 1):
        value = 1.0 - n / z * value
    return value
