"""What is learned from an image at a time: the loss of a configuration, and the times that are drawn for it.

Importance sampling takes its table from the configuration. The resampler of Nichol & Dhariwal 2021 adapts its table to
the losses of the run, which are equal to rounding only between one worker and several: a timestep at the edge of its
range could then differ, and no address would say any more what a run position sees. `timestep_rms` of the module
`likelihood` measures the table of a trained model instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusion_core.diffusion.bound import step_bits
from diffusion_core.diffusion.config import ProcessConfig
from diffusion_core.diffusion.losses import edm_weight, min_snr_weight, p2_weight, simple_loss
from diffusion_core.diffusion.objective_config import (
    LossKind,
    ObjectiveConfig,
    TimeDraw,
    Weighting,
    timestep_probabilities,
)
from diffusion_core.diffusion.process import GaussianProcess, Network
from diffusion_core.diffusion.schedules import make_schedule


class Objective:
    """The loss of each image.

    Args:
        process: what the network predicts of which noise.
        config: which loss; it has to suit the process, see `check_objective`.
    """

    def __init__(self, process: GaussianProcess, config: ObjectiveConfig | None = None) -> None:
        self.process = process
        self.config = config or ObjectiveConfig()
        self._importance: Tensor | None = None
        if self.config.times is TimeDraw.IMPORTANCE:
            timesteps = process.schedule.timesteps
            probabilities = timestep_probabilities(self.config.importance, timesteps)
            self._importance = 1.0 / (timesteps * torch.tensor(probabilities, dtype=torch.float64))

    def __call__(self, network: Network, x0: Tensor, t: Tensor, noise: Tensor, **cond: Any) -> Tensor:
        """The loss of each image.

        Args:
            network: called as network(x_t, t, **cond).
            x0: (N, C, H, W) in [-1, 1].
            t: (N,) times, as from `training_times`.
            noise: standard normal, of the shape of x0.

        Returns:
            (N,) float32 (float64 if x0 is). Its mean over times is, for vlb, the bound in bits per dimension without
            its constant L_T: T * L_t, with L_0 at t = 0.
        """
        x_t = self.process.q_sample(x0, t, noise)
        output = network(*self.process.network_inputs(x_t, t), **cond)
        prediction, fraction = self.process.split(output)
        if self.config.loss is LossKind.VLB:
            losses = self._bound(x0, x_t, t, prediction, fraction)
        else:
            losses = simple_loss(prediction, self.process.target(x0, t, noise))
            if self.config.weighting is not Weighting.NONE:
                losses = losses * self.weight(t).to(losses)
        if self.config.loss is LossKind.HYBRID:  # eq. 16 of Nichol & Dhariwal 2021, whose mean learns from `simple`
            losses = losses + self.config.bound_weight * self._bound(x0, x_t, t, prediction.detach(), fraction)
        if self._importance is None:
            return losses
        self._importance = self._importance.to(t.device)  # once, and not at every step
        return losses * self._importance[t].to(losses)

    def weight(self, t: Tensor) -> Tensor:
        """What the squared error of the network's output is multiplied by at times (N,), float64.

        The weights of the papers, which are of x0, times the squared error of x0 for one of the output: so they are
        the same objective for every prediction.
        """
        snr = torch.exp(self.process.schedule.log_snr(t))
        if self.config.weighting is Weighting.MIN_SNR:
            of_x0 = min_snr_weight(snr, self.config.min_snr_gamma)
        elif self.config.weighting is Weighting.P2:
            of_x0 = p2_weight(snr, self.config.p2_gamma, self.config.p2_k)
        elif self.config.weighting is Weighting.EDM:
            of_x0 = edm_weight(snr, self.process.sigma_data)
        else:
            return torch.ones_like(snr)
        return of_x0 * self.process.output_gain(t).square()

    def _bound(self, x0: Tensor, x_t: Tensor, t: Tensor, prediction: Tensor, fraction: Tensor | None) -> Tensor:
        x0_hat = self.process.predict_x0(x_t, t, prediction)
        return self.process.schedule.timesteps * step_bits(self.process, x0, x_t, t, x0_hat, fraction)


def training_times(process: ProcessConfig, objective: ObjectiveConfig) -> Callable[[Tensor], Tensor]:
    """The function from uniform variates in [0, 1) to times of their shape that an objective is trained at."""
    options = process.schedule_options()
    names = {"time_mean": "log_mean", "time_std": "log_std"}
    given = {ours: getattr(objective, name) for name, ours in names.items() if getattr(objective, name) is not None}
    if objective.times is TimeDraw.LOGIT_NORMAL:
        schedule = make_schedule(process.schedule, process.timesteps, **options)
        mean, std = given.get("log_mean", 0.0), given.get("log_std", 1.0)

        def logit_normal(uniform: Tensor) -> Tensor:  # Esser et al. 2024, section 3.1
            times = torch.sigmoid(mean + std * torch.special.ndtri(uniform.double()))
            return times.clamp(schedule.t_min, schedule.t_max)

        return logit_normal
    if objective.times is TimeDraw.IMPORTANCE:
        probabilities = timestep_probabilities(objective.importance, process.timesteps)
        ends = torch.tensor(probabilities, dtype=torch.float64).cumsum(0)
        total = float(ends[-1])

        def importance(uniform: Tensor) -> Tensor:
            nonlocal ends
            ends = ends.to(uniform.device)  # once, and not at every step
            at = torch.searchsorted(ends, uniform.double() * total, right=True)
            return at.clamp_(max=process.timesteps - 1)

        return importance
    return make_schedule(process.schedule, process.timesteps, **options, **given).training_times
