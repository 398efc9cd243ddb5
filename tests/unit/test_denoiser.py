"""The denoiser: reading the network's output, guidance, and thresholds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion_core.config import UserError
from diffusion_core.diffusion import Denoiser, GaussianProcess, GuidanceConfig, Prediction, SamplerConfig, make_schedule
from diffusion_core.diffusion.denoiser import dynamic_threshold, rescale_guided


class Labelled:
    """Predicts a different constant for each label and channel, plus the image; remembers its calls."""

    null_label = 10

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, x_t: Tensor, t: Tensor, /, label: Tensor) -> Tensor:
        self.calls.append((x_t, t, label))
        channels = torch.arange(1, x_t.shape[1] + 1, dtype=x_t.dtype)[None, :, None, None]
        return 0.1 * x_t + label.to(x_t.dtype)[:, None, None, None] * channels


def process(prediction: str = "epsilon") -> GaussianProcess:
    return GaussianProcess(make_schedule("cosine"), prediction)


def noisy(n: int = 4, channels: int = 3) -> Tensor:
    return torch.randn(n, channels, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


LABELS = torch.tensor([0, 3, 7, 9])


@pytest.mark.parametrize("prediction", list(Prediction))
def test_the_output_is_read_as_the_process_predicts(prediction: Prediction) -> None:
    p, x_t = process(prediction), noisy()
    times: list[Tensor] = []

    def network(x: Tensor, t: Tensor, /) -> Tensor:
        times.append(t)
        return 0.3 * x

    for t in (700, 700.0, torch.tensor([700] * 4)):
        seen = p.network_inputs(x_t, 700)[0]
        torch.testing.assert_close(Denoiser(p, network)(x_t, t), p.predict_x0(x_t, 700, 0.3 * seen))
    assert all(t.tolist() == [700.0] * 4 for t in times)


@pytest.mark.parametrize("prediction", list(Prediction))
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0, 7.5])
def test_guidance_is_u_plus_s_times_c_minus_u_in_every_channel(scale: float, prediction: Prediction) -> None:
    p, x_t, network = process(prediction), noisy(), Labelled()
    got = Denoiser(p, network, {"label": LABELS}, GuidanceConfig(scale=scale))(x_t, 400)
    seen = p.network_inputs(x_t, 400)[0]
    conditional = p.predict_epsilon(x_t, 400, network(seen, torch.tensor(400), label=LABELS))
    null = torch.full_like(LABELS, 10)
    unconditional = p.predict_epsilon(x_t, 400, network(seen, torch.tensor(400), label=null))
    guided = unconditional + scale * (conditional - unconditional)
    torch.testing.assert_close(got, p.predict_x0(x_t, 400, guided, "epsilon"))


def test_scale_one_and_none_are_the_same_and_ask_once_with_the_label() -> None:
    for guidance in (None, GuidanceConfig(), GuidanceConfig(scale=1)):
        network = Labelled()
        Denoiser(process(), network, {"label": LABELS}, guidance)(noisy(), 5)
        [(x, _, label)] = network.calls
        assert len(x) == 4
        assert torch.equal(label, LABELS)


def test_scale_zero_asks_once_without_the_label() -> None:
    network = Labelled()
    Denoiser(process(), network, {"label": LABELS}, GuidanceConfig(scale=0))(noisy(), 5)
    [(_, _, label)] = network.calls
    assert label.tolist() == [10] * 4


def test_guidance_is_one_doubled_batch() -> None:
    network, x_t = Labelled(), noisy()
    Denoiser(process(), network, {"label": LABELS}, GuidanceConfig(scale=2))(x_t, torch.tensor([1, 2, 3, 4]))
    [(x, t, label)] = network.calls
    assert torch.equal(x, torch.cat((x_t, x_t)))
    assert t.tolist() == [1, 2, 3, 4, 1, 2, 3, 4]
    assert label.tolist() == [0, 3, 7, 9, 10, 10, 10, 10]


def test_guidance_needs_labels() -> None:
    with pytest.raises(UserError, match=r"guidance\.scale: 2\.0 is not accepted without labels"):
        Denoiser(process(), Labelled(), None, GuidanceConfig(scale=2))

    class Unconditional(Labelled):
        null_label = 0

    with pytest.raises(UserError, match="unconditional"):
        Denoiser(process(), Unconditional(), {"label": LABELS}, GuidanceConfig(scale=0))


def outputs(x_t: Tensor, network: Labelled) -> tuple[Tensor, Tensor]:
    """With and without the label."""
    t = torch.tensor(400)
    return network(x_t, t, label=LABELS), network(x_t, t, label=torch.full_like(LABELS, 10))


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_rescaling_brings_back_the_deviation_of_each_image(share: float) -> None:
    """Lin et al. 2024, eq. 15 and 16, on the network's output."""
    x_t, network = noisy(), Labelled()
    got = Denoiser(process("x0"), network, {"label": LABELS}, GuidanceConfig(scale=5, rescale=share))(x_t, 400)
    conditional, unconditional = outputs(x_t, network)
    guided = unconditional + 5 * (conditional - unconditional)
    for index in range(4):
        ratio = conditional[index].std() / guided[index].std()
        torch.testing.assert_close(got[index], share * ratio * guided[index] + (1 - share) * guided[index])
    if share == 1.0:
        torch.testing.assert_close(got.flatten(1).std(dim=1), conditional.flatten(1).std(dim=1))


def test_a_flat_output_is_not_rescaled_into_infinity() -> None:
    flat = torch.zeros(2, 1, 2, 2)
    assert torch.equal(rescale_guided(flat, flat + 1, 1.0), flat)


@pytest.mark.parametrize("t", [100, 400, 900])
def test_guidance_has_an_interval_in_log_snr(t: int) -> None:
    """Inside both outputs are asked for, outside only the one with the label (Kynkäänniemi et al. 2024)."""
    p, x_t, network = process(), noisy(), Labelled()
    low, high = float(p.schedule.log_snr(700)), float(p.schedule.log_snr(200))
    guidance = GuidanceConfig(scale=3, min_log_snr=low, max_log_snr=high)
    got = Denoiser(p, network, {"label": LABELS}, guidance)(x_t, t)
    inside = t == 400
    assert [len(x) for x, _, _ in network.calls] == [8 if inside else 4]
    conditional, unconditional = outputs(x_t, network)
    expected = unconditional + 3 * (conditional - unconditional) if inside else conditional
    torch.testing.assert_close(got, p.predict_x0(x_t, t, expected))


def test_times_on_both_sides_of_the_interval_in_one_batch() -> None:
    p, x_t, network = process(), noisy(), Labelled()
    guidance = GuidanceConfig(scale=3, min_log_snr=float(p.schedule.log_snr(500)))
    t = torch.tensor([100, 499, 501, 900])
    got = Denoiser(p, network, {"label": LABELS}, guidance)(x_t, t)
    conditional, unconditional = outputs(x_t, network)
    scale = torch.tensor([3.0, 3.0, 1.0, 1.0], dtype=torch.float64)[:, None, None, None]
    torch.testing.assert_close(got, p.predict_x0(x_t, t, unconditional + scale * (conditional - unconditional)))


@pytest.mark.parametrize("limits", [{"min_log_snr": 0.0}, {"max_log_snr": 0.0}])
def test_the_interval_may_be_open_at_one_end(limits: dict[str, float]) -> None:
    p, network = process(), Labelled()
    denoiser = Denoiser(p, network, {"label": LABELS}, GuidanceConfig(scale=3, **limits))
    denoiser(noisy(), 10)
    denoiser(noisy(), 990)
    sizes = [len(x) for x, _, _ in network.calls]
    assert sizes == ([8, 4] if "min_log_snr" in limits else [4, 8])


@pytest.mark.parametrize("prediction", list(Prediction))
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_a_guide_takes_the_place_of_the_missing_label(scale: float, prediction: Prediction) -> None:
    """Karras et al. 2024 ("Guiding a diffusion model with a bad version of itself"), in terms of x0."""
    p, x_t, network = process(prediction), noisy(), Labelled()

    class Weaker(Labelled):
        def __call__(self, x_t: Tensor, t: Tensor, /, label: Tensor) -> Tensor:
            return 0.7 * super().__call__(x_t, t, label=label) - 1.0

    guide = Weaker()
    got = Denoiser(p, network, {"label": LABELS}, GuidanceConfig(scale=scale), guide=guide)(x_t, 400)
    assert len(network.calls) == (0 if scale == 0.0 else 1), "never twice, and never without the label"
    assert len(guide.calls) == (0 if scale == 1.0 else 1)
    assert all(torch.equal(label, LABELS) for _, _, label in network.calls + guide.calls)
    seen = p.network_inputs(x_t, 400)[0]
    ours = p.predict_x0(x_t, 400, network(seen, torch.tensor(400), label=LABELS))
    theirs = p.predict_x0(x_t, 400, guide(seen, torch.tensor(400), label=LABELS))
    torch.testing.assert_close(got, theirs + scale * (ours - theirs))


def test_a_guide_without_labels_is_asked_without_and_guides_models_without() -> None:
    p, x_t = process("x0"), noisy()

    def guide(x: Tensor, t: Tensor, /) -> Tensor:
        return 0.5 * x

    got = Denoiser(p, Labelled(), {"label": LABELS}, GuidanceConfig(scale=2), guide=guide)(x_t, 400)
    ours = Labelled()(x_t, torch.tensor(400), label=LABELS)
    torch.testing.assert_close(got, 2 * ours - 0.5 * x_t)
    got = Denoiser(p, lambda x, t, /: x, None, GuidanceConfig(scale=2, rescale=1.0), guide=guide)(x_t, 400)
    torch.testing.assert_close(got, x_t, msg="1.5 x, brought back to the deviation of x")


def test_half_precision_outputs_are_combined_in_float32() -> None:
    class Half(Labelled):
        def __call__(self, x_t: Tensor, t: Tensor, /, label: Tensor) -> Tensor:
            return super().__call__(x_t, t, label=label).bfloat16()

    x_t = noisy().float()
    got = Denoiser(process("x0"), Half(), {"label": LABELS}, GuidanceConfig(scale=3))(x_t, 5)
    assert got.dtype == torch.float32
    c = Half()(x_t, torch.tensor(5), label=LABELS).float()
    u = Half()(x_t, torch.tensor(5), label=torch.full_like(LABELS, 10)).float()
    torch.testing.assert_close(got, u + 3 * (c - u))


def constant(value: Tensor) -> Denoiser:
    return Denoiser(process("x0"), lambda x, t, /: value)


def test_thresholds() -> None:
    value = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 3
    x_t = torch.zeros_like(value)

    def predict(threshold: SamplerConfig | str | None) -> Tensor:
        return Denoiser(process("x0"), lambda x, t, /: value, threshold=threshold)(x_t, 5)

    assert torch.equal(predict(None), value)
    assert torch.equal(predict("none"), value)
    assert torch.equal(predict("static"), value.clamp(-1, 1))
    assert torch.equal(predict("dynamic"), dynamic_threshold(value, 0.995))
    config = SamplerConfig.model_validate({"threshold": "dynamic", "threshold_quantile": 0.7})
    assert torch.equal(predict(config), dynamic_threshold(value, 0.7))
    assert torch.equal(predict(SamplerConfig()), value.clamp(-1, 1))


@settings(max_examples=40, deadline=None)
@given(quantile=st.floats(0.01, 1), scale=st.floats(0.1, 20), n=st.integers(1, 4), size=st.integers(1, 40))
def test_dynamic_threshold_is_a_quantile_of_each_image_and_at_least_one(
    quantile: float, scale: float, n: int, size: int
) -> None:
    x0 = torch.randn(n, 1, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)) * scale
    x0[0] /= 100 * scale  # one image in range
    got = dynamic_threshold(x0, quantile)
    limit = torch.quantile(x0.float().abs().flatten(1), quantile, dim=1).clamp(min=1).double()[:, None, None]
    torch.testing.assert_close(got, x0.clamp(-limit, limit) / limit, rtol=1e-6, atol=1e-7)
    assert torch.equal(got[0], x0[0])
    assert float(got.abs().max()) <= 1 + 1e-12


def test_the_quantile_is_found_in_float32() -> None:
    """Halfway between two neighbours in bfloat16: rounded to either of them, one result would differ."""
    x0 = torch.tensor([[2.0, -2.015625]], dtype=torch.bfloat16)
    got = dynamic_threshold(x0, 0.5)
    assert got.dtype == torch.bfloat16
    assert got.tolist() == [[0.99609375, -1.0]]


def test_large_batches_have_no_limit() -> None:
    """torch.quantile refuses more than 16 million elements."""
    x0 = torch.zeros(1, 1).expand(17_000_000, 1)
    assert dynamic_threshold(x0, 0.5).shape == x0.shape
