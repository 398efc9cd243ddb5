"""How likely images are under a model, in bits per dimension: the variational bound, and exactly by an ODE."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffusion_core.config import UserError
from diffusion_core.diffusion.bound import prior_bits, step_bits
from diffusion_core.diffusion.denoiser import Estimate
from diffusion_core.diffusion.noise import KeyedNoise, keyed_uniform
from diffusion_core.diffusion.objective_config import range_shares
from diffusion_core.diffusion.process import GaussianProcess
from diffusion_core.diffusion.samplers.base import Denoise, Noise
from diffusion_core.diffusion.schedules import NoiseSchedule


class Bound(NamedTuple):
    """The variational bound of images, all in bits per dimension.

    total: (N,), the sum of the others; prior: (N,), L_T; steps: (N, K), L_t of each step, the most noise first and L_0,
    the pixels, last.
    """

    total: Tensor
    prior: Tensor
    steps: Tensor


class Likelihood(NamedTuple):
    """Exact likelihood of images, each (N,) float64.

    log_density: nats, of x0 in [-1, 1] as points; bits_per_dim: of pixels of 8 bits if x0 was `dequantised`;
    standard_error: of bits_per_dim by the chance of the probes, from how far they differ; not a number with one probe.
    """

    log_density: Tensor
    bits_per_dim: Tensor
    standard_error: Tensor


@torch.no_grad()
def variational_bound(
    process: GaussianProcess, denoiser: Denoise, x0: Tensor, noise: Noise, steps: int | None = None
) -> Bound:
    """An upper bound of -log2 p(x0) per dimension (Ho et al. 2020, eq. 5), by one sample of each x_t.

    It is the cost of ancestral sampling at the same times with the process's variance; with the learned one the
    denoiser has to tell it, as `Denoiser` does.

    Args:
        x0: (N, C, H, W), values of pixels in [-1, 1], as from `images_to_network`.
        noise: of the steps, as `KeyedNoise`: the bound of an image does not depend on its batch.
        steps: evaluations of the denoiser, T if None; fewer give a looser bound.

    Raises:
        UserError: if the schedule does not take that many steps, or it is one only.
    """
    schedule = process.schedule
    times = schedule.times(schedule.timesteps if steps is None else steps)
    if len(times) < 2:
        raise UserError("steps: 1 is not accepted: a bound needs at least 2.")
    terms = []
    for index, (t, s) in enumerate(zip(times, [*times[1:], schedule.t_clean], strict=True)):
        x_t = process.q_sample(x0, t, noise.normal(x0.shape[1:], index, device=x0.device, dtype=x0.dtype))
        found = denoiser.estimate(x_t, t) if hasattr(denoiser, "estimate") else Estimate(denoiser(x_t, t))
        terms.append(step_bits(process, x0, x_t, t, found.x0_hat, found.fraction, s))
    prior, per_step = prior_bits(process, x0, times[0]), torch.stack(terms, dim=1)
    return Bound(prior + per_step.sum(dim=1), prior, per_step)


def timestep_rms(steps: Tensor, ranges: int) -> tuple[float, ...]:
    """Root mean squares of L_t in equal ranges of the steps, the least noise first: the best `importance` of training.

    Nichol & Dhariwal 2021, eq. 18.

    Args:
        steps: (N, T), `Bound.steps` of images with all T steps, or (1, T), the root mean squares of each step.

    Raises:
        UserError: if there are more ranges than steps.
    """
    if not 1 <= ranges <= steps.shape[1]:
        raise UserError(f"ranges: {ranges} is not accepted: from 1 to {steps.shape[1]}, the number of steps.")
    squares = steps.double().square().mean(dim=0).flip(0).tolist()
    means = [0.0] * ranges
    for t, i, share in range_shares(ranges, len(squares)):
        means[i] += share * squares[t]
    return tuple(math.sqrt(mean) for mean in means)


def log_likelihood(
    schedule: NoiseSchedule,
    denoiser: Denoise,
    x0: Tensor,
    noise: Noise,
    steps: int = 50,
    probes: int = 1,
    probe: Literal["rademacher", "normal"] = "rademacher",
) -> Likelihood:
    """log p(x0) of what the probability-flow ODE makes of noise (Song et al. 2021, section 4.3, eq. 39 and 40).

    The ODE starts at t_min, since no schedule has a score at the clean image: the density is that of images with the
    noise sigma / alpha of t_min, 0.002 to 0.01, added.

    It is solved from the image to the noise in z = x_t / sqrt(alpha**2 + sigma**2) over a = asinh(alpha / sigma), where
    every schedule becomes dz/da = x0_hat - tanh(a) * z: without a division, even in the logarithm of little noise,
    and finite in pure noise. By fixed steps of the classical Runge-Kutta method, so with an error of fourth order:
    twice as many steps show how large it was. The divergence is estimated by Hutchinson's e^T J e with the same probes
    e all along (Grathwohl et al. 2019, section 3.1).

    Args:
        denoiser: differentiable in x_t, so without a threshold; asked 4 * steps times, and each time for `probes`
            products with its Jacobian.
        x0: (N, C, H, W); pixels should be `dequantised`.
        noise: of the probes, as `KeyedNoise`.
        probes: more make the estimate less noisy; its mean is exact with any number.
        probe: normal has more noise, unless the Jacobian is far from diagonal.

    Raises:
        UserError: if there is no step or no probe.
    """
    if steps < 1 or probes < 1:
        raise UserError(f"steps: {steps} with {probes} probes is not accepted: at least 1 of each is needed.")
    x0 = x0 if x0.dtype.itemsize >= 4 else x0.float()
    draws = [noise.normal(x0.shape[1:], k, device=x0.device, dtype=x0.dtype) for k in range(probes)]
    flow = _Flow(schedule, denoiser, [_signs(e) for e in draws] if probe == "rademacher" else draws)
    first, last = (math.asinh(math.exp(0.5 * float(schedule.log_snr(t)))) for t in (schedule.t_min, schedule.t_max))
    z, gained = math.tanh(first) * x0, torch.zeros(probes, len(x0), dtype=torch.float64, device=x0.device)
    h = (last - first) / steps
    for index in range(steps):
        a = first + index * h
        dz_1, div_1 = flow(z, a)
        dz_2, div_2 = flow(z + 0.5 * h * dz_1, a + 0.5 * h)
        dz_3, div_3 = flow(z + 0.5 * h * dz_2, a + 0.5 * h)
        dz_4, div_4 = flow(z + h * dz_3, a + h)
        z = z + h / 6.0 * (dz_1 + 2.0 * dz_2 + 2.0 * dz_3 + dz_4)
        gained = gained + h / 6.0 * (div_1 + 2.0 * div_2 + 2.0 * div_3 + div_4)
    t, size = schedule.t_max, x0[0].numel()
    std = schedule.prior_scale(t) / math.hypot(float(schedule.alpha(t)), float(schedule.sigma(t)))
    prior = -0.5 * (z.double() / std).square().flatten(1).sum(dim=1) - size * (math.log(std) + _LOG_SQRT_2_PI)
    each = prior + gained + size * math.log(math.tanh(first))  # of x_t / alpha, where z = tanh(a) * x_t / alpha
    log_density, bit = each.mean(dim=0), size * math.log(2.0)
    error = each.std(dim=0) / math.sqrt(probes) if probes > 1 else torch.full_like(log_density, math.nan)
    return Likelihood(log_density, math.log2(127.5) - log_density / bit, error / bit)


def dequantised(pixels: Tensor, noise: KeyedNoise) -> Tensor:
    """uint8 pixels (N, H, W, C) as points: float32 (N, C, H, W), uniform in the range that rounds to each value.

    The mean of -log2 of a density there is at least that of the pixels themselves (Theis et al. 2016, section 3.1).
    """
    shape = pixels.shape[1:]
    share = keyed_uniform(noise.seed, f"{noise.purpose}/dequantise", noise.image_ids, shape, pixels.device)
    return ((pixels.double() + share - 0.5) / 127.5 - 1.0).float().permute(0, 3, 1, 2)


_LOG_SQRT_2_PI = 0.5 * math.log(2.0 * math.pi)


class _Flow:
    """dz/da at (z, a), (N, ...), and its divergence by each probe, (probes, N) float64."""

    def __init__(self, schedule: NoiseSchedule, denoiser: Denoise, probes: list[Tensor]) -> None:
        self.schedule, self.denoiser, self.probes = schedule, denoiser, probes

    def __call__(self, z: Tensor, a: float) -> tuple[Tensor, Tensor]:
        # In pure noise, where a is 0, rounding may lead past it.
        log_snr = 2.0 * math.log(max(math.sinh(a), 1e-300))
        t = max(float(self.schedule.time_of(log_snr)), self.schedule.t_min)
        scale = math.hypot(float(self.schedule.alpha(t)), float(self.schedule.sigma(t)))
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            x0_hat = self.denoiser(scale * leaf, t)
            traces = []
            for e in self.probes:
                (product,) = torch.autograd.grad(x0_hat, leaf, e.to(x0_hat.dtype), retain_graph=True)
                traces.append((product.double() * e).flatten(1).sum(dim=1))
        return x0_hat.detach() - math.tanh(a) * z, torch.stack(traces) - math.tanh(a) * z[0].numel()


def _signs(e: Tensor) -> Tensor:
    return torch.where(e >= 0.0, 1.0, -1.0).to(e.dtype)
