"""The solvers against the installed `diffusers`, which computes them in float32: agreement ends near 1e-5."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_core.diffusion import Denoiser, DiscreteSchedule, GaussianProcess, make_sampler, make_schedule
from diffusion_core.diffusion.samplers import DDIMSampler
from tests.references import Fixed, dpm_solver, model

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
STEPS = [10, 13, 20]  # 13 does not divide 1000; below 15 the last steps are of lower order


def network(x_t: Tensor, t: Tensor, /) -> Tensor:
    """Any function will do, as long as it is not linear and depends on everything."""
    return torch.tanh(1.7 * x_t + 0.3 * x_t.roll(1, dims=-1)) + torch.sin(t.double() / 50.0)[:, None, None, None] * 0.4


def epsilon_network(x_t: Tensor, t: Tensor, /) -> Tensor:
    """The noise of a bounded image: any other is divided by alpha = 0.006 at the start, which float32 does not bear."""
    schedule, x_t = linear(), x_t.double()
    alpha, sigma = (c(t)[:, None, None, None] for c in (schedule.alpha, schedule.sigma))
    return (x_t - alpha * network(x_t, t)) / sigma


NETWORKS = {"epsilon": epsilon_network, "x0": network, "v": network}


def start() -> Tensor:
    return torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class GeneratorNoise:
    """The noise that diffusers draws from a torch generator, in its order and precision."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(7), dtype

    def normal(self, shape, step, draw=0, device=None, dtype=torch.float64):  # type: ignore[no-untyped-def]
        return torch.randn(3, *shape, generator=self.generator, dtype=self.dtype).to(dtype)


def linear() -> DiscreteSchedule:
    schedule = make_schedule("linear")
    assert isinstance(schedule, DiscreteSchedule)
    return schedule


def peer(name: str, **options: Any) -> Any:
    """A scheduler of the peer with our tables: its own are float32 from the start."""
    scheduler = getattr(diffusers, name)(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", timestep_spacing="trailing", **options
    )
    scheduler.alphas_cumprod = linear().alphas_cumprod
    return scheduler


def ours(kind: str, times: list[float], prediction: str = "epsilon", noise: Any = None, **options: Any) -> Tensor:
    schedule = linear()
    denoiser = Denoiser(GaussianProcess(schedule, prediction), NETWORKS[prediction])
    return make_sampler(kind, schedule, len(times), times=times, **options).sample(
        denoiser, start(), noise or GeneratorNoise()
    )


def theirs(scheduler: Any, x: Tensor, prediction: str = "epsilon", **options: Any) -> Tensor:
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = torch.Generator().manual_seed(7)
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(NETWORKS[prediction](seen, t.expand(3)), t, x, **options).prev_sample
    return x.double()


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction", list(PREDICTIONS))
def test_dpm_solver_2m(prediction: str, steps: int) -> None:
    scheduler = peer("DPMSolverMultistepScheduler", prediction_type=PREDICTIONS[prediction], final_sigmas_type="zero")
    scheduler.set_timesteps(steps)
    times = [float(t) for t in scheduler.timesteps]
    assert times == linear().times(steps)
    got = ours("dpmpp_2m", times, prediction)
    torch.testing.assert_close(got, theirs(scheduler, start(), prediction), **CLOSE)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction", list(PREDICTIONS))
def test_sde_dpm_solver_2m(prediction: str, steps: int) -> None:
    scheduler = peer(
        "DPMSolverMultistepScheduler",
        algorithm_type="sde-dpmsolver++",
        prediction_type=PREDICTIONS[prediction],
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(steps)
    got = ours("dpmpp_2m_sde", [float(t) for t in scheduler.timesteps], prediction)
    torch.testing.assert_close(got, theirs(scheduler, start(), prediction), **CLOSE)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_solvers_on_karras_noise_levels(name: str, steps: int) -> None:
    """With a network that does not look at the time, which the peer rounds to whole timesteps."""
    scheduler = peer(name, prediction_type="sample", use_karras_sigmas=True, final_sigmas_type="zero")
    scheduler.set_timesteps(steps)
    x, schedule = start(), linear()
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(1.7 * x), t, x).prev_sample
    denoiser = Denoiser(GaussianProcess(schedule, "x0"), lambda x, t, /: torch.tanh(1.7 * x))
    kind = "dpmpp_2m" if name.startswith("DPM") else "unipc"
    got = make_sampler(kind, schedule, steps, spacing="karras").sample(denoiser, start())
    torch.testing.assert_close(got, x.double(), **CLOSE)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {}),
        ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("unipc", "UniPCMultistepScheduler", {}),
    ],
)
def test_solvers_on_flow_matching(kind: str, name: str, options: dict[str, Any], steps: int) -> None:
    """From the peer's first noise level, which is a little below 1."""
    scheduler = getattr(diffusers, name)(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, final_sigmas_type="zero", **options
    )
    scheduler.set_timesteps(steps)
    levels = [float(sigma) for sigma in scheduler.sigmas[:-1]]

    def velocity(x: Tensor, t: Tensor, /) -> Tensor:
        return torch.tanh(1.7 * x)

    x, drawn = levels[0] * start(), {"generator": torch.Generator().manual_seed(7)} if "sde" in kind else {}
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, t), t, x, **drawn).prev_sample
    schedule = make_schedule("flow")
    denoiser = Denoiser(GaussianProcess(schedule, "flow"), velocity)
    got = make_sampler(kind, schedule, steps, times=levels).sample(denoiser, start(), GeneratorNoise())
    torch.testing.assert_close(got, x.double(), **CLOSE)


@pytest.mark.parametrize("steps", [13, 20])
@pytest.mark.parametrize("sde", [False, True])
def test_the_peers_third_order_has_half_of_the_last_term(sde: bool, steps: int) -> None:
    """It agrees with the reference in which that term is as in the authors' code, and so not with ours.

    Ours is right: it is exact for estimates quadratic in lambda, and of third order (`test_solvers.py`,
    `test_convergence.py`). The peer's own UniPC of third order, which is tested below, integrates them exactly too.
    """
    algorithm = "sde-dpmsolver++" if sde else "dpmsolver++"
    scheduler = peer("DPMSolverMultistepScheduler", solver_order=3, algorithm_type=algorithm, final_sigmas_type="zero")
    scheduler.set_timesteps(steps)
    schedule, x, draws = linear(), torch.full((1,), 0.7, dtype=torch.float64), Fixed()
    levels = [(float(schedule.alpha(t)), float(schedule.sigma(t)), float(t)) for t in scheduler.timesteps]
    for (alpha, sigma, t), step in zip(levels, scheduler.timesteps, strict=True):
        epsilon = (x - alpha * model(float(x), t)) / sigma
        z = torch.tensor([draws()]) if sde and step != scheduler.timesteps[-1] else torch.zeros(1)
        x = scheduler.step(epsilon, step, x, variance_noise=z).prev_sample
    assert float(x) == pytest.approx(dpm_solver(3, sde, peer=True)(0.7, levels, Fixed()), rel=1e-5, abs=1e-5)
    assert float(x) != pytest.approx(dpm_solver(3, sde)(0.7, levels, Fixed()), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction", list(PREDICTIONS))
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order: int, prediction: str, steps: int) -> None:
    scheduler = peer(
        "UniPCMultistepScheduler",
        solver_order=order,
        solver_type="bh2",
        prediction_type=PREDICTIONS[prediction],
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(steps)
    got = ours("unipc", [float(t) for t in scheduler.timesteps], prediction, order=order)
    torch.testing.assert_close(got, theirs(scheduler, start(), prediction), **CLOSE)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("kind", ["euler", "heun"])
def test_euler_and_heun(kind: str, prediction: str, steps: int) -> None:
    """Its x is x_t / alpha, and starts at that of ours."""
    scheduler = peer(
        {"euler": "EulerDiscreteScheduler", "heun": "HeunDiscreteScheduler"}[kind],
        prediction_type=PREDICTIONS[prediction],
    )
    scheduler.set_timesteps(steps)
    times = linear().times(steps)
    assert sorted({float(t) for t in scheduler.timesteps}, reverse=True) == times
    got = ours(kind, times, prediction)
    torch.testing.assert_close(got, theirs(scheduler, start() / float(linear().alpha(999)), prediction), **CLOSE)


@pytest.mark.parametrize("steps", STEPS)
def test_the_peers_churn_comes_too_late(steps: int) -> None:
    """It adds the noise after the network was asked, so that the slope is that of the image before (with its own time).

    Algorithm 2 of Karras et al. 2022 asks at the noisier image and time, lines 5 to 7; ours does so, to 1e-10 in
    `test_solvers.py`. Without churn the two agree, as below.
    """
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    scheduler.set_timesteps(steps)
    levels, draws = [float(sigma) for sigma in scheduler.sigmas[:-1]], GeneratorNoise(torch.float64)
    x, generator = start() * levels[0], torch.Generator().manual_seed(7)
    plain, gamma = x, min(5.0 / steps, 2.0**0.5 - 1.0)
    for t, sigma, after in zip(scheduler.timesteps, levels, [*levels[1:], 0.0], strict=True):
        output = edm_network(scheduler.scale_model_input(x, t), t.expand(3))
        x = scheduler.step(output, t, x, s_churn=5.0, generator=generator).prev_sample
        raised = sigma * (1.0 + gamma)
        c_in, c_noise = (sigma**2 + 0.25) ** -0.5, torch.full((3,), sigma, dtype=torch.float64).log() / 4
        late = edm_network(c_in * plain, c_noise)
        plain = plain + (raised**2 - sigma**2) ** 0.5 * draws.normal((2, 4, 4), 0)
        x0 = 0.25 / (raised**2 + 0.25) * plain + raised * 0.5 / (raised**2 + 0.25) ** 0.5 * late
        plain = plain + (after - raised) * (plain - x0) / raised
    torch.testing.assert_close(x.double(), plain, rtol=1e-4, atol=1e-4)
    denoiser = Denoiser(GaussianProcess(make_schedule("edm"), "edm"), edm_network)
    sampler = make_sampler("euler", make_schedule("edm"), steps, spacing="karras", churn=5.0)
    assert not torch.allclose(
        sampler.sample(denoiser, start(), GeneratorNoise(torch.float64)), plain, rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("steps", STEPS)
def test_ancestral_euler_is_ddim_with_eta_one(steps: int) -> None:
    scheduler = peer("EulerAncestralDiscreteScheduler")
    scheduler.set_timesteps(steps)
    got = ours("ddim", linear().times(steps), eta=1.0, noise=GeneratorNoise(torch.float64))
    torch.testing.assert_close(got, theirs(scheduler, start() / float(linear().alpha(999))), **CLOSE)


@pytest.mark.parametrize("steps", [1, 10, 13, 1000])
@pytest.mark.parametrize("rho", [7.0, 3.0])
def test_karras_noise_levels(rho: float, steps: int) -> None:
    schedule = linear()
    scheduler = diffusers.EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02)
    sigmas = np.exp(-0.5 * schedule.log_snr(torch.arange(1000)).numpy())[::-1]
    least, greatest = sigmas[-1], sigmas[0]
    expected = (
        scheduler._convert_to_karras(np.array([greatest, least]), steps)
        if rho == 7.0 and steps > 1
        else (greatest ** (1 / rho) + np.linspace(0, 1, steps) * (least ** (1 / rho) - greatest ** (1 / rho))) ** rho
    )
    times = torch.tensor(schedule.times(steps, "karras", rho), dtype=torch.float64)
    np.testing.assert_allclose(torch.exp(-0.5 * schedule.log_snr(times)), expected, rtol=1e-9)


def edm_network(x: Tensor, t: Tensor, /) -> Tensor:
    return torch.tanh(1.3 * x + 0.4 * t.to(x.dtype)[:, None, None, None])


@pytest.mark.parametrize("steps", [10, 13, 20])
@pytest.mark.parametrize(
    ("kind", "name"), [("euler", "EDMEulerScheduler"), ("dpmpp_2m", "EDMDPMSolverMultistepScheduler")]
)
def test_edm_preconditioning_and_solvers(kind: str, name: str, steps: int) -> None:
    """The whole path: noise levels, c_in, c_noise, c_skip and c_out, and the starting noise."""
    scheduler = getattr(diffusers, name)(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    scheduler.set_timesteps(steps)
    x = start() * 80.0
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(edm_network(seen, t.expand(3)), t, x).prev_sample
    schedule = make_schedule("edm")
    denoiser = Denoiser(GaussianProcess(schedule, "edm"), edm_network)
    got = make_sampler(kind, schedule, steps, spacing="karras").sample(denoiser, start())
    torch.testing.assert_close(got, x.double(), **CLOSE)


@pytest.mark.parametrize("steps", [10, 13, 20])
@pytest.mark.parametrize("kind", ["euler", "heun"])
def test_flow_matching(kind: str, steps: int) -> None:
    if kind == "heun":
        scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
        scheduler.set_timesteps(steps)
    else:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1e-3, steps).tolist())
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(3)), t, x).prev_sample
    schedule = make_schedule("flow")
    denoiser = Denoiser(GaussianProcess(schedule, "flow"), network)
    got = make_sampler(kind, schedule, steps, spacing="linspace").sample(denoiser, start())
    torch.testing.assert_close(got, x.double(), **CLOSE)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_zero_terminal_snr(beta_schedule: str) -> None:
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    plain = make_schedule(beta_schedule)
    rescaled = make_schedule(beta_schedule, rescale_zero_terminal_snr=True)
    assert isinstance(plain, DiscreteSchedule)
    assert isinstance(rescaled, DiscreteSchedule)
    torch.testing.assert_close(rescaled.betas, rescale_zero_terminal_snr(plain.betas), **EXACT)


@pytest.mark.parametrize("steps", [10, 20])
def test_ddim_inversion(steps: int) -> None:
    """With a step that divides T: it takes the timestep before as t - T // n."""
    schedule = linear()
    scheduler = diffusers.DDIMInverseScheduler(clip_sample=False)
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.initial_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    x = 0.5 * start()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(3)), t, x).prev_sample
    sampler = DDIMSampler(schedule, steps, spacing="leading")
    assert [float(t) for t in scheduler.timesteps] == sampler.times[::-1]
    got = sampler.invert(Denoiser(GaussianProcess(schedule), network), 0.5 * start())
    torch.testing.assert_close(got, x, **EXACT)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_guidance_rescale(share: float) -> None:
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    from diffusion_core.diffusion.denoiser import rescale_guided

    guided, conditional = 4 * start(), start().flip(0)
    torch.testing.assert_close(
        rescale_guided(guided, conditional, share), rescale_noise_cfg(guided, conditional, share), **EXACT
    )
