"""What belongs to a run's identity, and what a training configuration refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from diffusion_core.bundle import BundleConfig, DatasetReference
from diffusion_core.config import UserError, digest, explain
from diffusion_core.diffusion.config import ProcessConfig
from diffusion_core.training import TrainingConfig, open_run
from diffusion_core.training.run import check_start
from tests.toy_training import toy_dataset, toy_network, toy_spec

EXECUTION = {
    "images": 5000,
    "time_budget_s": 10.0,
    "checkpoint_every_images": 70,
    "keep_checkpoints": 9,
    "ema_snapshot_every_images": 20,
    "ema_keep_snapshots": 7,
    "preview_every_images": 30,
    "preview_images": 7,
    "preview_steps": 3,
    "log_every_images": 11,
    "memory_budget_mb": 1,
}
IDENTITY = {
    "batch_size": 20,
    "microbatch_size": 5,
    "learning_rate": 0.5,
    "betas": (0.5, 0.9),
    "weight_decay": 0.1,
    "warmup_images": 0,
    "grad_clip": None,
    "ema_halflife_images": 7,
    "ema_rampup_ratio": None,
    "ema": "power",
    "label_dropout": 0.5,
    "precision": "bfloat16",
    "compile": True,
    "channels_last": True,
    "threads": 2,
    "seed": 1,
    "horizontal_flip": True,
    "objective": {"weighting": "min_snr"},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(str(tmp_path_factory.mktemp("data")))


def test_every_field_is_known_to_be_identity_or_execution():
    assert set(TrainingConfig.model_fields) == {*EXECUTION, *IDENTITY, "init_from", "ema_sigma_rels"}


@pytest.mark.parametrize(("name", "value"), EXECUTION.items())
def test_execution_fields_continue_the_same_run(store, dataset, name, value):
    base, changed = toy_spec(dataset), toy_spec(dataset, **{name: value})
    assert getattr(base.training, name) != value
    assert open_run(store, base).run_id == open_run(store, changed).run_id


@pytest.mark.parametrize(("name", "value"), IDENTITY.items())
def test_identity_fields_make_another_run(store, dataset, name, value):
    assert open_run(store, toy_spec(dataset)).run_id != open_run(store, toy_spec(dataset, **{name: value})).run_id


def test_the_widths_of_power_averages_are_identity(store, dataset):
    ids = {
        open_run(store, toy_spec(dataset, **fields)).run_id
        for fields in ({}, {"ema": "power"}, {"ema": "power", "ema_sigma_rels": (0.05, 0.2)})
    }
    assert len(ids) == 3


def test_ids_of_what_was_made_before_the_new_fields_stay():
    """Digest of the first release."""
    assert digest(TrainingConfig()) == "6bf7382bfc8f8d54"


def test_the_data_decide_the_run_not_their_place(store, tmp_path, dataset):
    same = toy_dataset(str(tmp_path / "copy"))
    other = toy_dataset(str(tmp_path / "other"), seed=1)
    run_id = open_run(store, toy_spec(dataset)).run_id
    assert same != dataset and open_run(store, toy_spec(same)).run_id == run_id
    assert open_run(store, toy_spec(other)).run_id != run_id


def test_the_network_decides_the_run(store, dataset):
    one, other = toy_spec(dataset), toy_spec(dataset, toy_network(dropout=0.1))
    assert open_run(store, one).run_id != open_run(store, other).run_id


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"batch_size": 8, "microbatch_size": 16}, "microbatch_size 16 must be at most batch_size"),
        ({"betas": (0.9, 1.0)}, "must both lie in [0, 1)"),
        ({"label_dropout": 1.0}, "label_dropout"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"precision": "float16"}, "precision"),
        ({"images": 0}, "images"),
        ({"ema": "cosine"}, "ema"),
        ({"ema": "power", "ema_sigma_rels": (0.05, 0.3)}, "ema_sigma_rels.1: 0.3 is not accepted"),
        ({"ema": "power", "ema_sigma_rels": (0.1, 0.1)}, "ema_sigma_rels [0.1, 0.1] must be two different widths"),
        ({"ema_sigma_rels": (0.05, 0.2)}, "ema_sigma_rels is for the moving average power only"),
        ({"colour": 1}, "colour: there is no such field"),
    ],
)
def test_mistakes_are_named(values, said):
    with pytest.raises(ValidationError) as caught:
        TrainingConfig(**values)
    assert said in explain(caught.value)


def test_sizes_that_do_not_divide_are_refused(store, dataset):
    with pytest.raises(UserError, match=r"8x8 pixels do not fit network\.channel_multipliers"):
        open_run(store, toy_spec(dataset, toy_network(channel_multipliers=(1, 1, 1, 1, 1))))


def test_a_model_reference_needs_the_job(store, dataset):
    with pytest.raises(UserError, match="models:/digits@champion must be resolved"):
        open_run(store, toy_spec(dataset, init_from="models:/digits@champion"))


def test_the_target_is_a_whole_number_of_batches():
    assert TrainingConfig(batch_size=10, microbatch_size=10, images=95).target_images == 100
    assert TrainingConfig(batch_size=10, microbatch_size=10, images=100).target_images == 100


def test_configuration_and_run_import_without_torch():
    code = "import sys, diffusion_core.training.config, diffusion_core.training.run; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_a_start_from_weights_that_fit():
    """Only what the weights depend on has to be equal; dropout has none."""
    theirs = BundleConfig(
        process=ProcessConfig(),
        network=toy_network(),
        image_shape=(8, 8, 1),
        dataset=DatasetReference(name="toy", version="v", uri="/v"),
        run_id="r",
        images_seen=0,
    )
    check_start(theirs, toy_network(dropout=0.1), ProcessConfig(timesteps=50), 1)
    for network, prediction, channels, said in (
        (toy_network(base_channels=16), "epsilon", 1, "network.base_channels = 8, and this run has 16"),
        (toy_network(), "v", 1, "predicts epsilon"),
        (toy_network(), "epsilon", 3, "1 channels, and the dataset has 3"),
    ):
        with pytest.raises(UserError, match=said):
            check_start(theirs, network, ProcessConfig(prediction=prediction), channels)
