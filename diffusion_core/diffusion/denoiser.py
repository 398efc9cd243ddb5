"""A network made into a denoiser: (x_t, t) -> the estimate of x0 that a sampler asks for.

Conditioning, guidance and thresholding live here, so that samplers never see them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion_core.config import UserError
from diffusion_core.diffusion.config import GuidanceConfig, SamplerConfig, Threshold
from diffusion_core.diffusion.process import GaussianProcess, Network
from diffusion_core.diffusion.schedules import Time


class Denoiser:
    """x0_hat(x_t, t) of a trained network.

    Args:
        process: tells how the network's output is read.
        network: called as network(x_t, t, **cond). For guidance it needs the attribute `null_label`.
        cond: keyword arguments for the network, as {"label": (N,) int64}; None for none.
        guidance: classifier-free guidance, or None, which is the same as a scale of 1.
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
        self.scale = 1.0 if guidance is None else guidance.scale
        if not isinstance(threshold, SamplerConfig):
            threshold = SamplerConfig(threshold=Threshold(threshold or Threshold.NONE))
        self.threshold = threshold.threshold
        self.threshold_quantile = threshold.threshold_quantile
        if self.scale != 1.0 and (self.cond.get("label") is None or not getattr(network, "null_label", 0)):
            raise UserError(
                f"guidance.scale: {self.scale} is not accepted without labels: an unconditional model takes only 1."
            )

    def __call__(self, x_t: Tensor, t: Time) -> Tensor:
        """The estimate of x0.

        Args:
            x_t: (N, C, H, W), floating.
            t: one time for all images, or (N,) times.

        Returns:
            (N, C, H, W) in the dtype of x_t, but at least float32; in [-1, 1] when thresholded.
        """
        # float32 holds every discrete timestep; networks embed t in float32 anyway.
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        if isinstance(t, Tensor):
            times = t.to(device=x_t.device, dtype=dtype).expand(len(x_t))
        else:
            times = torch.full((len(x_t),), t, dtype=dtype, device=x_t.device)
        x0_hat = self.process.predict_x0(x_t, t, self._output(x_t, times).to(dtype))
        if self.threshold is Threshold.STATIC:
            return x0_hat.clamp(-1.0, 1.0)
        if self.threshold is Threshold.DYNAMIC:
            return dynamic_threshold(x0_hat, self.threshold_quantile)
        return x0_hat

    def _output(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The guided output u + s * (c - u) (Ho & Salimans 2022, eq. 6, whose w is s - 1).

        For a given x_t the noise, x0 and v are affine functions of each other, and the two weights add up to 1: it
        makes no difference which of them is combined.
        """
        if self.scale == 1.0:
            return self.network(x_t, t, **self.cond)
        null = {**self.cond, "label": torch.full_like(self.cond["label"], self._null_label)}
        if self.scale == 0.0:
            return self.network(x_t, t, **null)
        both: dict[str, Any] = {name: torch.cat((value, null[name])) for name, value in self.cond.items()}
        output = self.network(torch.cat((x_t, x_t)), torch.cat((t, t)), **both)
        conditional, unconditional = output.to(torch.promote_types(output.dtype, torch.float32)).chunk(2)
        return unconditional + self.scale * (conditional - unconditional)

    @property
    def _null_label(self) -> int:
        return int(self.network.null_label)  # type: ignore[attr-defined]


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
