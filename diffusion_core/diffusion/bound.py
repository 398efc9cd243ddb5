"""The terms of the variational bound of -log p(x0) in bits per dimension (Ho et al. 2020, eq. 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_core.diffusion.losses import bits_per_dim, decoder_nats, gaussian_kl
from diffusion_core.diffusion.process import GaussianProcess
from diffusion_core.diffusion.schedules import Time


def step_bits(
    process: GaussianProcess,
    x0: Tensor,
    x_t: Tensor,
    t: Time,
    x0_hat: Tensor,
    fraction: Tensor | None = None,
    s: Time | None = None,
) -> Tensor:
    """L_t: what the step from t to s costs; at s = t_clean it is L_0, the cost of the pixels themselves.

    Args:
        x0: (N, C, H, W), values of pixels in [-1, 1].
        x_t: a sample of q(x_t | x0).
        t, s: one time, or (N,); s is t-1 unless it is given.
        x0_hat: the denoiser's estimate.
        fraction: where a learned variance lies, see `GaussianProcess.split`.

    Returns:
        (N,) bits per dimension.
    """
    q, p = process.posterior(x0, x_t, t, s), process.p_step(x0_hat, x_t, t, s, fraction)
    clean = torch.as_tensor(t, device=x0.device) - 1 if s is None else torch.as_tensor(s, device=x0.device)
    kl = bits_per_dim(gaussian_kl(q.mean, q.log_variance, p.mean, p.log_variance))
    decoder = bits_per_dim(decoder_nats(x0.to(p.mean.dtype), p.mean, p.log_variance))
    return torch.where(clean == process.schedule.t_clean, decoder, kl)


def prior_bits(process: GaussianProcess, x0: Tensor, t: float | None = None) -> Tensor:
    """L_T: KL from q(x_T | x0) to the noise that sampling starts from, (N,) bits per dimension; t_max unless given."""
    t = process.schedule.t_max if t is None else t
    x0 = x0 if x0.dtype.itemsize >= 4 else x0.float()
    alpha, sigma = (float(part(t)) for part in (process.schedule.alpha, process.schedule.sigma))
    ours, theirs = (2.0 * x0.new_tensor(std).log() for std in (sigma, process.schedule.prior_scale(t)))
    return bits_per_dim(gaussian_kl(alpha * x0, ours, torch.zeros_like(x0), theirs))
