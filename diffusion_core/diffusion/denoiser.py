"""A network made into a denoiser: (x_t, t) -> the estimate of x0 that a sampler asks for.

Conditioning, guidance and thresholding live here, so that samplers never see them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_core.config import UserError
from diffusion_core.diffusion.config import GuidanceConfig, SamplerConfig, Threshold
from diffusion_core.diffusion.process import GaussianProcess, Network
from diffusion_core.diffusion.schedules import Time


class Estimate(NamedTuple):
    """What is known of one step: x0_hat, and where a learned variance lies (see `GaussianProcess.split`) or None."""

    x0_hat: Tensor
    fraction: Tensor | None = None


class Denoiser:
    """x0_hat(x_t, t) of a trained network.

    Args:
        process: tells how the network's output is read.
        network: called as network(x_t, t, **cond). For guidance it needs the attribute `null_label`.
        cond: keyword arguments for the network, as {"label": (N,) int64}; None for none.
        guidance: classifier-free guidance, its interval and its rescaling; None is the same as a scale of 1.
        threshold: what is done to x0_hat, see `Threshold`; None for nothing. A `SamplerConfig` says it with the
            quantile of the dynamic threshold, which is 0.995 otherwise.

    Raises:
        UserError: if guidance other than 1 is asked of a network or a call without labels.
    """

    def __init__(
        self,
        process: GaussianProcess,
        network: Network,
        cond: Mapping[str, Tensor] | None = None,
        guidance: GuidanceConfig | None = None,
        threshold: SamplerConfig | Threshold | str | None = None,
    ) -> None:
        self.process = process
        self.network = network
        self.cond = dict(cond or {})
        self.guidance = guidance or GuidanceConfig()
        if not isinstance(threshold, SamplerConfig):
            threshold = SamplerConfig(threshold=Threshold(threshold or Threshold.NONE))
        self.threshold = threshold.threshold
        self.threshold_quantile = threshold.threshold_quantile
        scale = self.guidance.scale
        if scale != 1.0 and (self.cond.get("label") is None or not getattr(network, "null_label", 0)):
            raise UserError(
                f"guidance.scale: {scale} is not accepted without labels: an unconditional model takes only 1."
            )

    def __call__(self, x_t: Tensor, t: Time) -> Tensor:
        """The estimate of x0.

        Args:
            x_t: (N, C, H, W), floating.
            t: one time for all images, or (N,) times.

        Returns:
            (N, C, H, W) in the dtype of x_t, but at least float32; in [-1, 1] when thresholded.
        """
        return self.estimate(x_t, t).x0_hat

    def estimate(self, x_t: Tensor, t: Time) -> Estimate:
        """As a call, with the learned variance if the process has one: guided predictions keep that of the label."""
        output, fraction = self._output(*self.process.network_inputs(x_t, t), self._scale_at(t, len(x_t)))
        x0_hat = self.process.predict_x0(x_t, t, output.to(torch.promote_types(x_t.dtype, torch.float32)))
        if self.threshold is Threshold.STATIC:
            x0_hat = x0_hat.clamp(-1.0, 1.0)
        elif self.threshold is Threshold.DYNAMIC:
            x0_hat = dynamic_threshold(x0_hat, self.threshold_quantile)
        return Estimate(x0_hat, fraction)

    def _scale_at(self, t: Time, count: int) -> float | Tensor:
        """The guidance scale at time t: 1 outside of the interval (Kynkäänniemi et al. 2024).

        A number, unless images of one batch have times on both sides: then (N,).
        """
        low, high = self.guidance.min_log_snr, self.guidance.max_log_snr
        if self.guidance.scale == 1.0 or (low is None and high is None):
            return self.guidance.scale
        log_snr = self.process.schedule.log_snr(t)
        inside = torch.ones_like(log_snr, dtype=torch.bool)
        if low is not None:
            inside &= log_snr >= low
        if high is not None:
            inside &= log_snr <= high
        if bool(inside.all()):
            return self.guidance.scale
        return torch.where(inside, self.guidance.scale, 1.0).expand(count) if bool(inside.any()) else 1.0

    def _output(self, x: Tensor, t: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor | None]:
        """The guided prediction u + s * (c - u) (Ho & Salimans 2022, eq. 6, whose w is s - 1), rescaled if wanted.

        For a given x_t the noise, x0 and v are affine functions of each other, and the two weights add up to 1: without
        rescaling it makes no difference which of them is combined.
        """
        if isinstance(scale, float) and scale == 1.0:
            return self.process.split(self.network(x, t, **self.cond))
        null = {**self.cond, "label": torch.full_like(self.cond["label"], self._null_label)}
        if isinstance(scale, float) and scale == 0.0:
            return self.process.split(self.network(x, t, **null))
        both: dict[str, Any] = {name: torch.cat((value, null[name])) for name, value in self.cond.items()}
        output = self.network(torch.cat((x, x)), torch.cat((t, t)), **both)
        with_label, without = output.to(torch.promote_types(output.dtype, torch.float32)).chunk(2)
        (conditional, fraction), (unconditional, _) = self.process.split(with_label), self.process.split(without)
        if isinstance(scale, Tensor):
            scale = scale.to(conditional).reshape(-1, *(1,) * (conditional.ndim - 1))
        guided = unconditional + scale * (conditional - unconditional)
        if self.guidance.rescale:
            guided = rescale_guided(guided, conditional, self.guidance.rescale)
        return guided, fraction

    @property
    def _null_label(self) -> int:
        return int(self.network.null_label)  # type: ignore[attr-defined]


def rescale_guided(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """The guided output at the standard deviation of the conditional one (Lin et al. 2024, eq. 15 and 16).

    Args:
        guided, conditional: (N, ...) outputs of the network; the standard deviations are those of each image.
        share: phi, from 0 (left alone) to 1 (all the way).
    """
    deviations = [x.flatten(1).std(dim=1, correction=0) for x in (conditional, guided)]
    ratio = deviations[0] / deviations[1].clamp(min=torch.finfo(guided.dtype).tiny)
    factor = share * ratio + (1.0 - share)
    return guided * factor.reshape(-1, *(1,) * (guided.ndim - 1))


def dynamic_threshold(x0: Tensor, quantile: float) -> Tensor:
    """x0 clamped to [-s, s] and divided by s, with s a quantile of |x0| of each image (Saharia et al. 2022, 2.3).

    Args:
        x0: (N, ...).
        quantile: in (0, 1]; between two elements it is interpolated.

    Returns:
        Of the shape and dtype of x0, in [-1, 1]. s is found in float32 and is never below 1, so that an image that is
        in range is left alone.
    """
    # torch.quantile refuses more than 16 million elements, hence sorting.
    wide = x0.to(torch.promote_types(x0.dtype, torch.float32))
    ordered = wide.flatten(1).abs().float().sort(dim=1).values
    place = quantile * (ordered.shape[1] - 1)
    below = int(place)
    above = min(below + 1, ordered.shape[1] - 1)
    limit = torch.lerp(ordered[:, below], ordered[:, above], place - below).clamp(min=1.0)
    limit = limit.to(wide.dtype).reshape(-1, *(1,) * (x0.ndim - 1))
    return (torch.clamp(wide, -limit, limit) / limit).to(x0.dtype)
