"""The Gaussian process that a model is trained with: forward in closed form, posterior, and what the network predicts.

Tables are float64; coefficients are gathered first and cast to the images' dtype after. Images in half precision are
taken to float32: there the noise of the first timesteps would be lost in rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_core.config import UserError
from diffusion_core.diffusion.config import ProcessConfig
from diffusion_core.diffusion.kinds import Prediction, Variance
from diffusion_core.diffusion.losses import simple_loss
from diffusion_core.diffusion.predictions import EDMReading, Reading, make_reading
from diffusion_core.diffusion.schedules import NoiseSchedule, Time, make_schedule


class Network(Protocol):
    """Whatever predicts: a torch module, or any function of x_t (N, ...), t (N,) and the conditioning."""

    def __call__(self, x_t: Tensor, t: Tensor, /, **cond: Any) -> Tensor: ...


class Posterior(NamedTuple):
    """A Gaussian over x_s: `mean` has the shape of x_t, the variances are (N, 1, ..., 1) and of the same dtype; learned
    ones have the shape of x_t."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


class GaussianProcess:
    """A noise schedule together with what the network predicts.

    Shapes in all methods: images x0, x_t, noise and network outputs are (N, ...) and floating; times are (N,) of any
    dtype, or one number for the whole batch. Results have the images' dtype, but never less than float32.

    Args:
        schedule: alpha(t) and sigma(t).
        prediction: what the network's output stands for.
        variance: the variance of an ancestral step. With learned_range networks put out twice the channels, which
            `split` takes apart; all other methods want the prediction alone.
        sigma_data: standard deviation of the images, for the prediction edm.

    Raises:
        UserError: for an unknown prediction or variance, and for a schedule without any signal at its end (zero
            terminal SNR) when the noise is to be predicted, since no x0 follows from the noise there.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: Prediction | str = Prediction.EPSILON,
        variance: Variance | str = Variance.FIXED_SMALL,
        sigma_data: float = 0.5,
    ) -> None:
        self.schedule = schedule
        self.sigma_data = sigma_data
        self.prediction = _member(Prediction, prediction, "prediction")
        self.variance = _member(Variance, variance, "variance")
        if self.prediction is Prediction.EPSILON and schedule.ends_in_pure_noise:
            raise UserError(
                "prediction: epsilon is not accepted with a schedule that ends in pure noise (zero terminal SNR): "
                "choose v, x0, flow or edm."
            )

    def q_sample(self, x0: Tensor, t: Time, noise: Tensor) -> Tensor:
        """x_t = alpha(t) * x0 + sigma(t) * noise (Ho et al. 2020, eq. 4)."""
        x0, alpha, sigma = self._gather(x0, t)
        return alpha * x0 + sigma * noise.to(x0.dtype)

    def posterior(self, x0: Tensor, x_t: Tensor, t: Time, s: Time | None = None) -> Posterior:
        """q(x_s | x_t, x_0) (Ho et al. 2020, eq. 6 and 7), with s = t-1 unless it is given (needed in continuous time).

        At s = t_clean the variance is 0. Its logarithm is then replaced by that of the step before, from
        t+1 to t, as in the code of Ho et al.: it only ever meets a bound that is computed as if it were that small.
        """
        return self._step(x0, x_t, t, s, Variance.FIXED_SMALL)

    def p_step(
        self, x0_hat: Tensor, x_t: Tensor, t: Time, s: Time | None = None, fraction: Tensor | None = None
    ) -> Posterior:
        """p(x_s | x_t) of the model: the posterior's mean at x0_hat, with the variance that the process has chosen.

        With the variance fixed_large the step to the clean image keeps the forward variance, as in the paper; a
        sampler draws no noise there all the same.

        Args:
            fraction: of the variance learned_range, as from `split`. Its logarithm is interpolated between those of
                `posterior` and of the forward step (Nichol & Dhariwal 2021, eq. 15).

        Raises:
            ValueError: if the variance is learned and `fraction` is missing.
        """
        return self._step(x0_hat, x_t, t, s, self.variance, fraction)

    def split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """A network's output, (N, C, ...) or with a learned variance (N, 2C, ...), as prediction and variance.

        Returns:
            The prediction (N, C, ...), and where the variance lies: None unless it is learned; then (N, C, ...) of at
            least float32, 0 at the posterior's and 1 at the forward step's, for outputs of -1 and 1; not clamped.

        Raises:
            ValueError: if the variance is learned and the number of channels is odd.
        """
        if self.variance is not Variance.LEARNED_RANGE:
            return output, None
        if output.shape[1] % 2:
            raise ValueError(f"a learned variance needs twice the channels of the images, not {output.shape[1]}")
        prediction, v = output.chunk(2, dim=1)
        return prediction, (_wide(v) + 1.0) / 2.0

    def predict_x0(self, x_t: Tensor, t: Time, output: Tensor, prediction: Prediction | str | None = None) -> Tensor:
        """x0 from a network's output, read as `prediction` (default: the process's own)."""
        x_t, alpha, sigma = self._gather(x_t, t)
        return self._reading(prediction).x0(x_t, output.to(x_t.dtype), alpha, sigma)

    def predict_epsilon(
        self, x_t: Tensor, t: Time, output: Tensor, prediction: Prediction | str | None = None
    ) -> Tensor:
        """The noise from a network's output, read as `prediction` (default: the process's own)."""
        x_t, alpha, sigma = self._gather(x_t, t)
        return self._reading(prediction).epsilon(x_t, output.to(x_t.dtype), alpha, sigma)

    def predict_v(self, x_t: Tensor, t: Time, output: Tensor, prediction: Prediction | str | None = None) -> Tensor:
        """v = alpha * epsilon - sigma * x0 (Salimans & Ho 2022) from an output, read as `prediction`."""
        if self._kind(prediction) is Prediction.V:
            return output.to(_wide(x_t).dtype)
        epsilon = self.predict_epsilon(x_t, t, output, prediction)
        x0 = self.predict_x0(x_t, t, output, prediction)
        return self.target(x0, t, epsilon, Prediction.V)

    def score(self, x_t: Tensor, t: Time, output: Tensor, prediction: Prediction | str | None = None) -> Tensor:
        """grad log q(x_t) = -epsilon / sigma(t) (Song et al. 2021) from an output, read as `prediction`."""
        epsilon = self.predict_epsilon(x_t, t, output, prediction)
        return -epsilon / self._gather(x_t, t)[2]

    def target(self, x0: Tensor, t: Time, noise: Tensor, prediction: Prediction | str | None = None) -> Tensor:
        """What a perfect network would have put out for x0 and its noise."""
        x0, alpha, sigma = self._gather(x0, t)
        return self._reading(prediction).target(x0, noise.to(x0.dtype), alpha, sigma)

    def output_gain(self, t: Time) -> Tensor:
        """How much x0 changes with a unit of the network's output at a given x_t: float64, of the shape of t.

        Its square turns the squared error of an output into that of x0.
        """
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return self._reading(None).x0(torch.zeros_like(alpha), torch.ones_like(alpha), alpha, sigma)

    def network_inputs(self, x_t: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """What the network is called with: x_t, scaled where the schedule or the prediction wants it, and times (N,).

        The one path to a network, in training and in sampling.
        """
        dtype = torch.promote_types(x_t.dtype, torch.float32)  # float32 holds every timestep
        time = self.schedule.network_time(t)
        if isinstance(time, Tensor):
            times = time.to(device=x_t.device, dtype=dtype if time.is_floating_point() else None).expand(len(x_t))
        else:
            times = torch.full((len(x_t),), time, dtype=dtype, device=x_t.device)
        if self.prediction is Prediction.EDM:
            x_t, alpha, sigma = self._gather(x_t, t)
            return EDMReading(self.sigma_data).input_scale(alpha, sigma) * x_t, times
        scale = self.schedule.network_scale(t)
        return (x_t if scale is None else _column(scale, _wide(x_t)) * x_t), times

    def training_losses(self, network: Network, x0: Tensor, t: Tensor, noise: Tensor, **cond: Any) -> Tensor:
        """The simple loss of each image.

        Args:
            network: called as network(x_t, t, **cond).
            x0: (N, C, H, W) in [-1, 1].
            t: (N,) times, as from `schedule.training_times`.
            noise: standard normal, of the shape of x0.

        Returns:
            (N,) float32 (float64 if x0 is): mean squared error between the network's prediction and its target.
        """
        output = network(*self.network_inputs(self.q_sample(x0, t, noise), t), **cond)
        return simple_loss(self.split(output)[0], self.target(x0, t, noise))

    def classification_losses(self, classifier: Network, x0: Tensor, t: Tensor, noise: Tensor, label: Tensor) -> Tensor:
        """Cross-entropy (N,) of a classifier of noisy images, called as classifier(x_t, t); see `training_losses`."""
        logits = classifier(*self.network_inputs(self.q_sample(x0, t, noise), t))
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), label, reduction="none")

    def _step(
        self, x0: Tensor, x_t: Tensor, t: Time, s: Time | None, kind: Variance, fraction: Tensor | None = None
    ) -> Posterior:
        x_t = _wide(x_t)
        t = torch.as_tensor(t, dtype=torch.float64, device=x_t.device)
        s = t - 1 if s is None else torch.as_tensor(s, dtype=torch.float64, device=x_t.device)
        step = self.schedule.transition(s, t)
        mean = _column(step.x_t_coefficient, x_t) * x_t + _column(step.x0_coefficient, x_t) * x0
        if kind is Variance.FIXED_LARGE:
            return Posterior(mean, _column(step.forward_variance, x_t), _column(torch.log(step.forward_variance), x_t))
        low = _column(torch.log(self._floored(step.posterior_variance, s, t)), x_t)
        if kind is Variance.FIXED_SMALL:
            return Posterior(mean, _column(step.posterior_variance, x_t), low)
        if fraction is None:
            raise ValueError("the variance learned_range needs `fraction`, where the network says that it lies")
        log_variance = low + fraction.to(x_t.dtype) * (_column(torch.log(step.forward_variance), x_t) - low)
        return Posterior(mean, torch.exp(log_variance), log_variance)

    def _floored(self, variance: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """The variance with its zeros (at s = t_clean) replaced by that of the step from t + (t - s) to t."""
        before = self.schedule.transition(t, torch.clamp(2 * t - s, max=self.schedule.t_max)).posterior_variance
        return torch.where(s == self.schedule.t_clean, before, variance)

    def _gather(self, x: Tensor, t: Time) -> tuple[Tensor, Tensor, Tensor]:
        """x in at least float32, and alpha(t) and sigma(t) in its dtype, shaped to multiply it."""
        x = _wide(x)
        return x, _column(self.schedule.alpha(t), x), _column(self.schedule.sigma(t), x)

    def _kind(self, prediction: Prediction | str | None) -> Prediction:
        return self.prediction if prediction is None else _member(Prediction, prediction, "prediction")

    def _reading(self, prediction: Prediction | str | None) -> Reading:
        return make_reading(self._kind(prediction), self.sigma_data)


def make_process(config: ProcessConfig) -> GaussianProcess:
    """The process of a configuration."""
    schedule = make_schedule(config.schedule, config.timesteps, **config.schedule_options())
    return GaussianProcess(schedule, config.prediction, config.variance, config.sigma_data)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype.itemsize >= 4 else x.float()


def _column(values: Tensor, like: Tensor) -> Tensor:
    """A coefficient per image, (N,) or one number, in the dtype of `like` and shaped to multiply it."""
    if values.ndim == 0:  # torch takes one number of the CPU as it is; copying it would make a GPU wait
        return values.to(like.dtype)
    return values.to(like).reshape(values.shape + (1,) * (like.ndim - values.ndim))


def _member(kind: Any, value: Any, field: str) -> Any:
    if value not in set(kind):
        raise UserError(f"{field}: {str(value)!r} is not accepted: known are {', '.join(kind)}.")
    return kind(value)
