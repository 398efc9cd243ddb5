"""A compiled network trains as the eager one does, up to rounding, and continues bit-equal."""

from __future__ import annotations

import shutil

import pytest

from diffusion_core.training import open_run, train
from diffusion_core.training.run import INTERRUPTED
from tests.toy_training import StopAt, assert_same_weights, losses, toy_dataset, toy_network, toy_spec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU"),
]


def test_a_compiled_network_trains_the_same(tmp_path):
    dataset = toy_dataset(str(tmp_path / "data"))
    network = toy_network(channel_multipliers=(1,), attention_resolutions=())
    changes = {"images": 100, "log_every_images": 10, "compile": True}
    spec, eager = toy_spec(dataset, network, **changes), toy_spec(dataset, network, **{**changes, "compile": False})
    whole, parts, plain = (open_run(str(tmp_path / name), spec) for name in ("whole", "parts", "plain"))
    train(spec, whole)
    stop = StopAt(70, INTERRUPTED)
    assert train(spec, parts, progress=stop, should_stop=stop).images_seen == 70
    train(spec, parts)
    train(eager, plain)
    assert_same_weights(parts, whole)
    assert losses(whole) == {seen: pytest.approx(loss, rel=1e-4) for seen, loss in losses(plain).items()}
