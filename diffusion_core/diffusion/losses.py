"""The formulas of training objectives: one number for each image, and the weights of times."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF_BIN = 1.0 / 255.0  # half the distance of two neighbouring pixel values in [-1, 1]


def simple_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image (Ho et al. 2020, eq. 14, averaged over elements).

    Args:
        output, target: (N, ...), any floating dtype; compared in float32 (float64 stays).

    Returns:
        (N,) float32 (float64 if the target is).
    """
    wide = target if target.dtype.itemsize >= 4 else target.float()
    return (output.to(wide.dtype) - wide).square().flatten(1).mean(dim=1)


def gaussian_kl(mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor) -> Tensor:
    """KL(N(mean_1, variance_1) || N(mean_2, variance_2)) of each element, in nats; the arguments broadcast."""
    away = (mean_1 - mean_2).square() * torch.exp(-log_variance_2)
    ratio = log_variance_1 - log_variance_2
    return 0.5 * (torch.expm1(ratio) - ratio + away)


def decoder_nats(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log p(x0) of pixels under a Gaussian that is divided into the 256 pixel values (Ho et al. 2020, eq. 13).

    The first and the last value take all that lies beyond them.

    Args:
        x0: pixel values k / 127.5 - 1 in [-1, 1], of any shape; those of `from_uint8`.
        mean, log_variance: of the Gaussian; they broadcast to x0.

    Returns:
        Nats of each element, of the dtype of x0. Finite and with a finite gradient wherever the mean is: the tails are
        computed by logarithms, in float64, where the published code cuts them off at a probability of 1e-12.
    """
    precision = torch.exp(-0.5 * log_variance.double())
    away = x0.double() - mean.double()
    low, high = precision * (away - HALF_BIN), precision * (away + HALF_BIN)
    first, last = x0 < -1.0 + HALF_BIN, x0 > 1.0 - HALF_BIN
    # Mirrored where it lies above the mean, so that both ends are in the tail whose logarithm is precise.
    mirrored = low + high > 0.0
    below, above = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    log_above = torch.special.log_ndtr(above)
    gap = (torch.special.log_ndtr(below) - log_above).clamp(max=-torch.finfo(torch.float64).tiny)
    inside = log_above + torch.log(-torch.expm1(gap))
    edges = torch.special.log_ndtr(torch.where(first, high, -low))
    return -torch.where(first | last, edges, inside).to(x0.dtype)


def min_snr_weight(snr: Tensor, gamma: float) -> Tensor:
    """Weight min(SNR, gamma) of the squared error of x0 (Hang et al. 2023, section 3.4)."""
    return snr.clamp(max=gamma)


def p2_weight(snr: Tensor, gamma: float, k: float) -> Tensor:
    """Weight of the squared error of x0 that is 1 / (k + SNR)**gamma of that of the noise (Choi et al. 2022)."""
    return snr * (k + snr) ** -gamma


def edm_weight(snr: Tensor, sigma_data: float) -> Tensor:
    """Weight (sigma**2 + sigma_data**2) / (sigma * sigma_data)**2 of the squared error of x0, for sigma**-2 = SNR.

    Karras et al. 2022, table 1.
    """
    return snr + sigma_data**-2


def bits_per_dim(nats: Tensor) -> Tensor:
    """Nats of elements (N, ...) as mean bits of each image (N,)."""
    return nats.flatten(1).mean(dim=1) / math.log(2.0)
