"""Step by step against the installed `diffusers`, in float64 with the same tables and the same noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_core.diffusion import Denoiser, DiscreteSchedule, GaussianProcess, Spacing, make_sampler, make_schedule

diffusers = pytest.importorskip("diffusers")

PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


class GeneratorNoise:
    """The noise that diffusers draws from a torch generator, in its order."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)

    def normal(self, shape, step, draw=0, device=None, dtype=torch.float64):  # type: ignore[no-untyped-def]
        return torch.randn(3, *shape, generator=self.generator, dtype=dtype)


def network(x_t: Tensor, t: Tensor, /) -> Tensor:
    """Any function will do, as long as it is not linear and depends on everything."""
    return torch.tanh(1.7 * x_t + 0.3 * x_t.roll(1, dims=-1)) + torch.sin(t.double() / 50.0)[:, None, None, None] * 0.4


def schedule_of(kind: str) -> DiscreteSchedule:
    schedule = make_schedule(kind)
    assert isinstance(schedule, DiscreteSchedule)
    return schedule


def with_tables(scheduler: Any, schedule: DiscreteSchedule) -> Any:
    scheduler.betas = schedule.betas
    scheduler.alphas = 1.0 - schedule.betas
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def start() -> Tensor:
    return torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def ours(
    kind: str, schedule: DiscreteSchedule, prediction: str, clip: bool, times: list[int], **options: Any
) -> Tensor:
    """All intermediate states, stacked."""
    denoiser = Denoiser(GaussianProcess(schedule, prediction), network, threshold="static" if clip else "none")
    states: list[Tensor] = []
    sampler = make_sampler(kind, schedule, len(times), times=[float(t) for t in times], **options)
    sampler.sample(denoiser, start(), GeneratorNoise(), lambda step: states.append(step.x_s))
    return torch.stack(states)


def theirs(scheduler: Any, network: Callable[..., Tensor] = network, **options: Any) -> Tensor:
    x, states, generator = start(), [], torch.Generator().manual_seed(7)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(3)), t, x, generator=generator, **options).prev_sample
        states.append(x)
    return torch.stack(states)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", list(PREDICTIONS))
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps", [10, 13])  # 13 does not divide 1000
def test_ddpm(kind: str, prediction: str, clip: bool, variance: str, steps: int) -> None:
    """The times end at 0: from any other it adds noise to the last step (1e-10 of it with fixed_small)."""
    schedule = schedule_of(kind)
    scheduler = with_tables(
        diffusers.DDPMScheduler(prediction_type=PREDICTIONS[prediction], clip_sample=clip, variance_type=variance),
        schedule,
    )
    times = [int(t) for t in schedule.times(steps, Spacing.LINSPACE)]
    scheduler.set_timesteps(timesteps=times)
    got = ours("ddpm", schedule, prediction, clip, times, variance=variance)
    torch.testing.assert_close(got, theirs(scheduler), **EXACT)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", list(PREDICTIONS))
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps", [10, 13])
def test_ddpm_with_a_learned_variance(kind: str, prediction: str, clip: bool, steps: int) -> None:
    """With the betas of the visited times, also where these do not divide T; the network's variance leaves [-1, 1]."""
    schedule = schedule_of(kind)
    scheduler = with_tables(
        diffusers.DDPMScheduler(
            prediction_type=PREDICTIONS[prediction], clip_sample=clip, variance_type="learned_range"
        ),
        schedule,
    )
    times = [int(t) for t in schedule.times(steps, Spacing.LINSPACE)]
    scheduler.set_timesteps(timesteps=times)

    def two(x_t: Tensor, t: Tensor, /) -> Tensor:
        return torch.cat((network(x_t, t), 1.2 * torch.sin(5 * x_t)), dim=1)

    process = GaussianProcess(schedule, prediction, "learned_range")
    denoiser = Denoiser(process, two, threshold="static" if clip else "none")
    sampler = make_sampler("ddpm", schedule, steps, times=[float(t) for t in times], variance="learned_range")
    states: list[Tensor] = []
    sampler.sample(denoiser, start(), GeneratorNoise(), lambda step: states.append(step.x_s))
    torch.testing.assert_close(torch.stack(states), theirs(scheduler, two), **EXACT)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", list(PREDICTIONS))
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("steps", [10, 13])
def test_ddim(kind: str, prediction: str, clip: bool, eta: float, steps: int) -> None:
    """Its own list of times is used: it takes the previous timestep as t - T // n, which is right only for these."""
    schedule = schedule_of(kind)
    scheduler = with_tables(
        diffusers.DDIMScheduler(prediction_type=PREDICTIONS[prediction], clip_sample=clip), schedule
    )
    scheduler.set_timesteps(steps)
    times = [int(t) for t in scheduler.timesteps]
    got = ours("ddim", schedule, prediction, clip, times, eta=eta)
    # Without use_clipped_model_output it keeps the epsilon of before the clipping, against the paper's eq. 12.
    torch.testing.assert_close(got, theirs(scheduler, eta=eta, use_clipped_model_output=clip), **EXACT)


def test_ddim_with_trailing_times_that_do_not_divide() -> None:
    """The peer's t - T // n misses the visited times; ours goes from one visited time to the next."""
    schedule = schedule_of("linear")
    times = [int(t) for t in schedule.times(13)]
    scheduler = with_tables(diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False), schedule)
    scheduler.set_timesteps(13)
    assert scheduler.timesteps.tolist() == times
    x, states = start(), []
    for t, s in zip(times, [*times[1:], -1], strict=True):
        bar_t = schedule.alphas_cumprod[t]
        bar_s = schedule.alphas_cumprod[s] if s >= 0 else torch.tensor(1.0, dtype=torch.float64)
        epsilon = network(x, torch.tensor([float(t)] * 3))
        x = bar_s.sqrt() * (x - (1 - bar_t).sqrt() * epsilon) / bar_t.sqrt() + (1 - bar_s).sqrt() * epsilon
        states.append(x)
    got = ours("ddim", schedule, "epsilon", False, times)
    torch.testing.assert_close(got, torch.stack(states), **EXACT)
    assert not torch.allclose(got, theirs(scheduler), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_forward_process_and_velocity(kind: str) -> None:
    schedule = schedule_of(kind)
    scheduler = with_tables(diffusers.DDPMScheduler(), schedule)
    process, x0, noise, t = GaussianProcess(schedule, "v"), start(), start().flip(0), torch.tensor([0, 321, 999])
    torch.testing.assert_close(process.q_sample(x0, t, noise), scheduler.add_noise(x0, noise, t), **EXACT)
    torch.testing.assert_close(process.target(x0, t, noise), scheduler.get_velocity(x0, noise, t), **EXACT)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_timestep_spacings(spacing: str, steps: int) -> None:
    scheduler = diffusers.DDPMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    assert make_sampler("ddpm", make_schedule("linear"), steps, spacing=spacing).times == scheduler.timesteps.tolist()
