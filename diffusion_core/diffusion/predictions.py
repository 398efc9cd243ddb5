"""What a network's output stands for: one small class each, and one line in `_READINGS`.

Each is an affine function of x0 and epsilon that can be solved for both, given x_t = alpha * x0 + sigma * epsilon.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffusion_core.diffusion.kinds import Prediction


class Reading(ABC):
    """Images and outputs are (N, ...); alpha and sigma broadcast to them and are of their dtype."""

    @abstractmethod
    def x0(self, x_t: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The clean image of an output."""

    @abstractmethod
    def epsilon(self, x_t: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The noise of an output."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What a perfect network puts out."""


class EpsilonReading(Reading):
    """The noise (Ho et al. 2020, eq. 11)."""

    def x0(self, x_t: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * output) / alpha

    def epsilon(self, x_t: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return output

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise


class X0Reading(Reading):
    """The clean image."""

    def x0(self, x_t: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return output

    def epsilon(self, x_t: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - alpha * output) / sigma

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x0


class VReading(Reading):
    """v = alpha * epsilon - sigma * x0 (Salimans & Ho 2022, section 4 and appendix D)."""

    # alpha**2 + sigma**2 is 1 for variance-preserving schedules; dividing keeps the others right.
    def x0(self, x_t: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha * x_t - sigma * output) / (alpha.square() + sigma.square())

    def epsilon(self, x_t: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (sigma * x_t + alpha * output) / (alpha.square() + sigma.square())

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * noise - sigma * x0


class FlowReading(Reading):
    """The velocity epsilon - x0 of the straight line from image to noise (Lipman et al. 2023, eq. 23)."""

    def x0(self, x_t: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * output) / (alpha + sigma)

    def epsilon(self, x_t: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t + alpha * output) / (alpha + sigma)

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise - x0


class EDMReading(Reading):
    """The preconditioned network F with D = c_skip * x + c_out * F(c_in * x) (Karras et al. 2022, eq. 7 and table 1).

    Their x is x_t / alpha and their sigma is sigma / alpha; multiplied out, nothing is divided by alpha, which may be
    0. The mean squared error of F is their loss (eq. 8), whose weight is 1 / c_out**2.
    """

    def __init__(self, sigma_data: float) -> None:
        self.sigma_data = sigma_data

    def x0(self, x_t: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        scale = self.input_scale(alpha, sigma)
        return (alpha * self.sigma_data**2 * scale.square()) * x_t + (sigma * self.sigma_data * scale) * output

    def epsilon(self, x_t: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        scale = self.input_scale(alpha, sigma)
        return (sigma * scale.square()) * x_t - (alpha * self.sigma_data * scale) * output

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        scale = self.input_scale(alpha, sigma)
        return (sigma * scale / self.sigma_data) * x0 - (alpha * self.sigma_data * scale) * noise

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """c_in, what x_t is multiplied by before the network sees it: 1 / its standard deviation."""
        return torch.rsqrt(sigma.square() + (alpha * self.sigma_data).square())


_READINGS = {
    Prediction.EPSILON: lambda sigma_data: EpsilonReading(),
    Prediction.X0: lambda sigma_data: X0Reading(),
    Prediction.V: lambda sigma_data: VReading(),
    Prediction.FLOW: lambda sigma_data: FlowReading(),
    Prediction.EDM: EDMReading,
}


def make_reading(prediction: Prediction, sigma_data: float) -> Reading:
    """How outputs of a kind are read; `sigma_data` is the standard deviation of the images, for edm."""
    return _READINGS[prediction](sigma_data)
