"""A network made into a denoiser: (x_t, t) -> the estimate of x0 that a sampler asks for.

Conditioning, guidance and thresholding live here, so that samplers never see them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion_core.config import UserError
from diffusion_core.diffusion.config import GuidanceConfig, SamplerConfig
from diffusion_core.diffusion.kinds import Threshold
from diffusion_core.diffusion.process import GaussianProcess, Network
from diffusion_core.diffusion.schedules import Time

Classifier = Callable[[Tensor, Time], Tensor]


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
        guidance: its scale, interval and rescaling; None is the same as a scale of 1.
        threshold: what is done to x0_hat, see `Threshold`; None for nothing. A `SamplerConfig` says it with the
            quantile of the dynamic threshold, which is 0.995 otherwise.
        guide: a weaker network of the same process to guide away from, called like the network, but without a label if
            it has no `null_label`. None: the network itself without the label.
        classifier: called as classifier(x_t, t) with what the denoiser is called with; gives logits (N, classes).

    Raises:
        UserError: if guidance other than 1 is asked of a network or a call without labels, and there is no guide, or
            classifier guidance without a classifier or without labels.
    """

    def __init__(
        self,
        process: GaussianProcess,
        network: Network,
        cond: Mapping[str, Tensor] | None = None,
        guidance: GuidanceConfig | None = None,
        threshold: SamplerConfig | Threshold | str | None = None,
        guide: Network | None = None,
        classifier: Classifier | None = None,
    ) -> None:
        self.process = process
        self.network = network
        self.cond = dict(cond or {})
        self.guidance = guidance or GuidanceConfig()
        self.guide, self.classifier = guide, classifier
        if not isinstance(threshold, SamplerConfig):
            threshold = SamplerConfig(threshold=Threshold(threshold or Threshold.NONE))
        self.threshold = threshold.threshold
        self.threshold_quantile = threshold.threshold_quantile
        scale = self.guidance.scale
        unlabelled = self.cond.get("label") is None or not getattr(network, "null_label", 0)
        if scale != 1.0 and guide is None and unlabelled:
            raise UserError(
                f"guidance.scale: {scale} is not accepted without labels: an unconditional model takes only 1, or a "
                "guide."
            )
        if self.guidance.classifier_scale and (classifier is None or self.cond.get("label") is None):
            raise UserError(
                f"guidance.classifier_scale: {self.guidance.classifier_scale} needs a classifier (guidance.classifier) "
                "and labels."
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
        scale = self._scale_at(t, len(x_t), self.guidance.scale, 1.0)
        output, fraction = self._output(*self.process.network_inputs(x_t, t), scale)
        x0_hat = self.process.predict_x0(x_t, t, output.to(torch.promote_types(x_t.dtype, torch.float32)))
        x0_hat = self._classified(x_t, t, x0_hat)
        if self.threshold is Threshold.STATIC:
            x0_hat = x0_hat.clamp(-1.0, 1.0)
        elif self.threshold is Threshold.DYNAMIC:
            x0_hat = dynamic_threshold(x0_hat, self.threshold_quantile)
        return Estimate(x0_hat, fraction)

    def _scale_at(self, t: Time, count: int, scale: float, neutral: float) -> float | Tensor:
        """A guidance scale at time t: neutral outside of the interval (Kynkäänniemi et al. 2024).

        A number, unless images of one batch have times on both sides: then (N,).
        """
        low, high = self.guidance.min_log_snr, self.guidance.max_log_snr
        if scale == neutral or (low is None and high is None):
            return scale
        log_snr = self.process.schedule.log_snr(t)
        inside = torch.ones_like(log_snr, dtype=torch.bool)
        if low is not None:
            inside &= log_snr >= low
        if high is not None:
            inside &= log_snr <= high
        if bool(inside.all()):
            return scale
        return torch.where(inside, scale, neutral).expand(count) if bool(inside.any()) else neutral

    def _classified(self, x_t: Tensor, t: Time, x0_hat: Tensor) -> Tensor:
        """x0_hat moved towards the label by the classifier (Dhariwal & Nichol 2021, algorithm 2).

        The noise sigma(t) * s * grad log p(label | x_t) is taken out of the predicted one, so that x0_hat moves by
        s * sigma(t)^2 / alpha(t) * grad. In pure noise there is nothing to classify, and nothing moves.
        """
        scale = self._scale_at(t, len(x_t), self.guidance.classifier_scale, 0.0)
        if self.classifier is None or (isinstance(scale, float) and scale == 0.0):
            return x0_hat
        alpha, sigma = self.process.schedule.alpha(t), self.process.schedule.sigma(t)
        weight = torch.where(alpha > 0, scale * sigma**2 / alpha, 0.0).to(x0_hat)
        gradient = label_gradient(self.classifier, x_t.to(x0_hat.dtype), t, self.cond["label"])
        return x0_hat + weight.reshape(-1, *(1,) * (x0_hat.ndim - 1)) * gradient

    def _output(self, x: Tensor, t: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor | None]:
        """The guided prediction u + s * (c - u), rescaled if wanted, and where c says that the variance lies.

        u is without the label (Ho & Salimans 2022, eq. 6, whose w is s - 1) or the guide's (autoguidance, Karras et al.
        2024). For a given x_t the noise, x0 and v are affine functions of each other, and the two weights add up to 1:
        without rescaling it makes no difference which of them is combined.
        """
        if isinstance(scale, float) and scale == 1.0:
            return self.process.split(self.network(x, t, **self.cond))
        if isinstance(scale, float) and scale == 0.0:
            return self.process.split(self._weaker(x, t))
        (better, fraction), (weaker, _) = map(self.process.split, self._both(x, t))
        if isinstance(scale, Tensor):
            scale = scale.to(better).reshape(-1, *(1,) * (better.ndim - 1))
        guided = weaker + scale * (better - weaker)
        if self.guidance.rescale:
            guided = rescale_guided(guided, better, self.guidance.rescale)
        return guided, fraction

    def _both(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """c and u in at least float32; of one network, they are one call with a doubled batch."""
        if self.guide is not None:
            return _wide(self.network(x, t, **self.cond)), _wide(self._weaker(x, t))
        null = self._without_label()
        both: dict[str, Any] = {name: torch.cat((value, null[name])) for name, value in self.cond.items()}
        conditional, unconditional = _wide(self.network(torch.cat((x, x)), torch.cat((t, t)), **both)).chunk(2)
        return conditional, unconditional

    def _weaker(self, x: Tensor, t: Tensor) -> Tensor:
        if self.guide is None:
            return self.network(x, t, **self._without_label())
        knows = getattr(self.guide, "null_label", 0)
        return self.guide(x, t, **{name: value for name, value in self.cond.items() if knows or name != "label"})

    def _without_label(self) -> dict[str, Tensor]:
        null_label = int(self.network.null_label)  # type: ignore[attr-defined]
        return {**self.cond, "label": torch.full_like(self.cond["label"], null_label)}


def _wide(output: Tensor) -> Tensor:
    return output.to(torch.promote_types(output.dtype, torch.float32))


def label_gradient(classifier: Classifier, x_t: Tensor, t: Time, label: Tensor) -> Tensor:
    """The gradient of log p(label | x_t) with respect to x_t, of the shape and dtype of x_t.

    Works within `torch.inference_mode` too. Attention takes the one backward pass whose sums have a fixed order.
    """
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel([SDPBackend.MATH]):
        x = x_t.detach().clone().requires_grad_()  # what inference mode has made cannot take part in a gradient
        logits = classifier(x, t.clone() if isinstance(t, Tensor) else t)
        log_p = torch.log_softmax(logits.to(x.dtype), dim=1).gather(1, label.clone()[:, None])
        return torch.autograd.grad(log_p.sum(), x)[0]


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
