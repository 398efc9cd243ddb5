"""Power-function averages of the weights, and how one of any length follows from others (Karras et al. 2024, "EDM2").

At time t an average of exponent gamma weighs the weights of time tau <= t by p(tau) = (gamma + 1) tau^gamma /
t^(gamma + 1) (their section 3.1 and eq. 121). Its length is told as sigma_rel, the standard deviation of that
profile over t. Numbers only, in float64: nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_RCOND = 1e-12


def gamma_of(sigma_rel: float) -> float:
    """The exponent gamma >= 0 of a profile whose relative standard deviation is sigma_rel, in (0, 1 / sqrt(12)].

    The largest root of sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1 (their eq. 126, algorithm 2).
    """
    share = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - share, 12.0 - share])
    return float(roots[np.isreal(roots)].real.max())


def sigma_rel_of(gamma: float) -> float:
    """sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)) (their eq. 123): the inverse of `gamma_of`."""
    return math.sqrt((gamma + 1.0) / (gamma + 3.0)) / (gamma + 2.0)


def power_decay(gamma: float, images_seen: int, batch_size: int) -> float:
    """The share of the average that a step keeps: (1 - 1 / n)^(gamma + 1) at the n-th step (their eq. 127).

    0 at the first step, so that nothing is left of the random start.
    """
    return float((1.0 - batch_size / images_seen) ** (gamma + 1.0))


def inner_products(
    gammas: np.ndarray, times: np.ndarray, other_gammas: np.ndarray, other_times: np.ndarray
) -> np.ndarray:
    """Integrals over tau of the products of two lists of profiles (their eq. 151), (N, M) float64."""
    a, t = np.asarray(gammas, np.float64)[:, None], np.asarray(times, np.float64)[:, None]
    b, s = np.asarray(other_gammas, np.float64)[None], np.asarray(other_times, np.float64)[None]
    # (min / max) to the exponent of the later profile: as a ratio, no power of a time can overflow.
    overlap = (np.minimum(t, s) / np.maximum(t, s)) ** np.where(t >= s, a, b)
    return (a + 1.0) * (b + 1.0) / (a + b + 1.0) * overlap / np.maximum(t, s)


def reconstruction_weights(
    gammas: Sequence[float] | np.ndarray, times: Sequence[float] | np.ndarray, gamma: float, time: float
) -> np.ndarray:
    """How to mix stored averages into one of exponent `gamma` at `time`: least squares over profiles (algorithm 3).

    Beyond the paper the weights have to add up to 1. Few snapshots cannot make a wide profile, and what is lacking
    would else be made up with zeros, which shrinks every weight of the network.

    Args:
        gammas, times: (N,) exponent and time of each stored average, of times up to `time`.
        gamma, time: of the average that is wanted.

    Returns:
        (N,) float64 weights.
    """
    kept = np.asarray(gammas, np.float64), np.asarray(times, np.float64)
    wanted = np.array([gamma], np.float64), np.array([time], np.float64)
    gram, aim = inner_products(*kept, *kept), inner_products(*kept, *wanted)[:, 0]
    lengths = np.sqrt(np.diag(gram))  # profiles of unit length, so that early and late ones weigh alike
    ones = 1.0 / lengths / np.linalg.norm(1.0 / lengths)
    system = np.block([[gram / np.outer(lengths, lengths), ones[:, None]], [ones[None], np.zeros((1, 1))]])
    right = np.append(aim / lengths, 1.0 / np.linalg.norm(1.0 / lengths))
    return np.linalg.lstsq(system, right, rcond=_RCOND)[0][:-1] / lengths


def reconstruction_error(
    weights: np.ndarray,
    gammas: Sequence[float] | np.ndarray,
    times: Sequence[float] | np.ndarray,
    gamma: float,
    time: float,
) -> float:
    """How far the profile that weights make is from the one wanted: L2 norm of the difference, over that of the latter.

    Args:
        weights: (N,) what `reconstruction_weights` made of the other arguments.
    """
    parts = np.append(gammas, gamma), np.append(times, time)
    mixed = np.append(weights, -1.0)
    gram = inner_products(*parts, *parts)
    return math.sqrt(max(0.0, float(mixed @ gram @ mixed / gram[-1, -1])))
