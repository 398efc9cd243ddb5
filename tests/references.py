"""Samplers on plain numbers, written from their papers, without a line of the project.

Each is (x, levels, draws) -> the result, with levels (alpha, sigma, t) of the visited times. Polynomials are integrated
by quadrature where the papers do it by formula, so that no algebra is shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch


def model(x: float, t: float) -> float:
    """Any function will do, as long as it is not linear and depends on both."""
    return math.tanh(0.9 * x - 0.2) + 0.3 * math.sin(3.0 * math.log1p(abs(t)))


class Fixed:
    """The same few draws for the sampler and for the reference."""

    def __init__(self) -> None:
        self.values = iter(np.random.default_rng(0).standard_normal(500).tolist())

    def __call__(self) -> float:
        return next(self.values)

    def normal(self, shape, step, draw=0, device=None, dtype=torch.float64):  # type: ignore[no-untyped-def]
        return torch.full((1, *shape), self(), dtype=dtype)


def integral(nodes: list[float], values: list[float], width: float, decay: float) -> float:
    """decay * integral of exp(-decay * (h - u)) * p(u) over u from 0 to h, p the polynomial through (nodes, values)."""
    u, weight = np.polynomial.legendre.leggauss(40)
    u = 0.5 * width * (u + 1.0)
    p = sum(
        v * np.prod([(u - b) / (a - b) for b in nodes if b != a], axis=0) for a, v in zip(nodes, values, strict=True)
    )
    return float(np.sum(0.5 * width * weight * decay * np.exp(-decay * (width - u)) * p))


def dpm_solver(order: int, sde: bool, peer: bool = False) -> Callable[..., float]:
    """Lu et al. 2022b, algorithm 2, and its third order; `peer`: with the last term of the authors' code."""

    def run(x: float, levels: list[tuple[float, float, float]], z: Fixed) -> float:
        lam = [math.log(a / s) for a, s, _ in levels]
        m: list[float] = []
        for i, (_, sigma_t, t) in enumerate(levels):
            m.append(model(x, t))
            if i == len(levels) - 1:
                return m[-1]
            alpha, sigma, _ = levels[i + 1]
            h = lam[i + 1] - lam[i]
            q = min(order, i + 1, len(levels) - i if len(levels) < 15 else order)
            decay = 2.0 if sde else 1.0
            if q == 1:
                mean = (1 - math.exp(-decay * h)) * m[i]
            elif q == 2:  # D = (1 + 1 / 2r) m_0 - 1 / 2r m_1
                r = (lam[i] - lam[i - 1]) / h
                mean = (1 - math.exp(-decay * h)) * ((1 + 0.5 / r) * m[i] - 0.5 / r * m[i - 1])
            elif peer:
                r0, r1 = (lam[i] - lam[i - 1]) / h, (lam[i - 1] - lam[i - 2]) / h
                d10, d11 = (m[i] - m[i - 1]) / r0, (m[i - 1] - m[i - 2]) / r1
                d1, d2 = d10 + r0 / (r0 + r1) * (d10 - d11), (d10 - d11) / (r0 + r1)
                e = decay * h
                kept = math.exp(-e)
                mean = (1 - kept) * m[i] + ((kept - 1) / e + 1) * d1
                mean += ((1 - kept - e) / e**2 - 0.5) * d2 if sde else (0.5 - (kept - 1 + e) / e**2) * d2
            else:
                mean = integral([lam[j] - lam[i] for j in (i, i - 1, i - 2)], [m[i], m[i - 1], m[i - 2]], h, decay)
            x = sigma / sigma_t * (math.exp(-h) if sde else 1.0) * x + alpha * mean
            if sde:
                x += sigma * math.sqrt(1 - math.exp(-2 * h)) * z()
        raise AssertionError

    return run


def unipc(order: int) -> Callable[..., float]:
    """Zhao et al. 2023: interpolation through three points or more, half of the slope where there are two."""

    def advance(x: float, a: tuple[float, ...], b: tuple[float, ...], nodes: list[float], values: list[float]) -> float:
        h = math.log(b[0] / b[1]) - math.log(a[0] / a[1])
        if len(nodes) == 2:
            mean = (1 - math.exp(-h)) * (values[0] + 0.5 * (values[1] - values[0]) / (nodes[1] / h))
        else:
            mean = integral(nodes, values, h, 1.0)
        return b[1] / a[1] * x + b[0] * mean

    def run(x: float, levels: list[tuple[float, float, float]], z: Fixed) -> float:
        lam = [math.log(a / s) for a, s, _ in levels]
        m: list[float] = []
        corrected = x
        for i, level in enumerate(levels):
            m.append(model(x, level[2]))
            if i == len(levels) - 1:
                return m[-1]
            if i:
                p = min(order, i, len(levels) - i + 1)
                at = [i - 1, *range(i - 2, i - 1 - p, -1), i]
                corrected = advance(
                    corrected, levels[i - 1], level, [lam[j] - lam[i - 1] for j in at], [m[j] for j in at]
                )
            p = min(order, i + 1, len(levels) - i)
            at = list(range(i, i - p, -1))
            x = advance(corrected, level, levels[i + 1], [lam[j] - lam[i] for j in at], [m[j] for j in at])
        raise AssertionError

    return run


def edm_algorithm_2(heun: bool, churn: float, low: float, high: float, noise: float) -> Callable[..., float]:
    """Karras et al. 2022, algorithm 2, line by line."""

    def run(x: float, levels: list[tuple[float, float, float]], z: Fixed) -> float:
        t = [sigma for _, sigma, _ in levels] + [0.0]
        for i in range(len(levels)):
            gamma = min(churn / len(levels), math.sqrt(2) - 1) if low <= t[i] <= high else 0.0
            t_hat = t[i] + gamma * t[i]
            if gamma:
                x = x + math.sqrt(t_hat**2 - t[i] ** 2) * noise * z()
            d = (x - model(x, t_hat)) / t_hat
            x_next = x + (t[i + 1] - t_hat) * d
            if t[i + 1] != 0 and heun:
                d_next = (x_next - model(x_next, t[i + 1])) / t[i + 1]
                x_next = x + (t[i + 1] - t_hat) * (0.5 * d + 0.5 * d_next)
            x = x_next
        return x

    return run


def predictor_corrector(snr: float, corrections: int) -> Callable[..., float]:
    """Song et al. 2021, algorithms 1 and 4, with ancestral steps; on one element the norms are absolute values."""

    def run(x: float, levels: list[tuple[float, float, float]], z: Fixed) -> float:
        for i, (alpha_t, sigma_t, t) in enumerate(levels):
            if i == len(levels) - 1:
                return model(x, t)
            alpha, sigma, later = levels[i + 1]
            forward = sigma_t**2 - (alpha_t / alpha) ** 2 * sigma**2
            mean = alpha_t / alpha * sigma**2 / sigma_t**2 * x + alpha * forward / sigma_t**2 * model(x, t)
            x = mean + math.sqrt(forward) * sigma / sigma_t * z()
            for _ in range(corrections):
                draw = z()
                score = (alpha * model(x, later) - x) / sigma**2
                size = 2 * (snr * abs(draw) / abs(score)) ** 2
                x = x + size * score + math.sqrt(2 * size) * draw
        raise AssertionError

    return run
