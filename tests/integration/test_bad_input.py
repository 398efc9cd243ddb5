"""Bad input gets one clear sentence that names the field and the value, in seconds, before Ray or Prefect is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_core.config import UserError
from tests.swift_server import SwiftServer

PIPELINE = ["pipeline", "-p", "digits", "--store", "{store}"]
SMALL = [
    *("--set", "network.base_channels=8", "--set", "network.channel_multipliers=[1]"),
    *("--set", "network.blocks_per_level=1", "--set", "network.head_channels=8"),
    *("--set", "network.attention_resolutions=[]"),
]
FROM_BUNDLE = ["train", "--dataset", "toy", "--store", "{store}", "--init-from", "{bundle}", *SMALL]
SEED = 7


@dataclass(frozen=True)
class Case:
    """A mistake: what is typed, and the words that the sentence must have. {names} are filled in by the world."""

    name: str
    arguments: list[str]
    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def setting(name: str, *settings: str, words: list[str]) -> Case:
    return Case(name, [*PIPELINE, *(part for item in settings for part in ("--set", item))], words)


def comparing(name: str, *options: str, words: list[str]) -> Case:
    compare = ["compare-samplers", "--model", "{bundle}", "--dataset", "toy", "--store", "{store}"]
    return Case(f"comparison: {name}", [*compare, *options], words)


CASES = [
    # The command line itself.
    Case("unknown verb", ["trian"], ["trian"]),
    Case("unknown option", ["pipeline", "--sauce", "x"], ["--sauce"]),
    Case("option without a value", ["pipeline", "--preset"], ["--preset"]),
    Case("a word where a number is needed", ["generate", "--count", "many"], ["generation.count", "many"]),
    Case("nothing said", ["pipeline", "--store", "{store}"], ["--preset", "--source"]),
    Case("unknown preset", ["pipeline", "-p", "digitz"], ["digitz", "did you mean digits", "fashion-mnist"]),
    Case("--set without a value", [*PIPELINE, "--set", "training.seed"], ["training.seed", "--set"]),
    Case("--set of a broken value", [*PIPELINE, "--set", "training.betas=[0.9"], ["training.betas", "[0.9"]),
    Case("a time that is none", [*PIPELINE, "--time-budget", "soon"], ["--time-budget", "soon", "20m"]),
    Case("an image size that is none", [*PIPELINE, "--image-size", "big"], ["--image-size", "big"]),
    Case("unknown list", ["list", "cats"], ["cats", "models", "datasets"]),
    Case("list of a store that is not there", ["list", "runs", "--store", "{tmp}/none"], ["{tmp}/none"]),
    # Files of settings.
    Case("no such file", ["pipeline", "-c", "{tmp}/none.yaml"], ["none.yaml", "no such file"]),
    Case("a folder as file", ["pipeline", "-c", "{tmp}"], ["{tmp}", "cannot be read"]),
    Case("broken YAML", ["pipeline", "-c", "{tmp}/broken.yaml"], ["broken.yaml", "not valid YAML", "line 3"]),
    Case("a YAML list", ["pipeline", "-c", "{tmp}/list.yaml"], ["list.yaml", "fields with values"]),
    Case("a field twice", ["pipeline", "-c", "{tmp}/twice.yaml"], ["twice.yaml", "seed", "twice"]),
    Case("a YAML tag that would run code", ["pipeline", "-c", "{tmp}/tag.yaml"], ["tag.yaml", "not valid YAML"]),
    Case("binary file", ["pipeline", "-c", "{tmp}/binary.yaml"], ["binary.yaml", "not text"]),
    Case("misspelt section", ["pipeline", "-c", "{tmp}/section.yaml"], ["trainnig", "did you mean training"]),
    Case("misspelt field", ["pipeline", "-c", "{tmp}/field.yaml"], ["training.lerning_rate", "training.learning_rate"]),
    Case("two presets", ["pipeline", "-p", "cifar10", "-c", "{tmp}/preset.yaml"], ["cifar10", "digits"]),
    # Fields and values.
    setting("unknown field", "training.batchsize=3", words=["training.batchsize", "training.batch_size"]),
    setting("a field of a plain value", "training.seed.x=3", words=["training.seed", "single value"]),
    setting("a value for a section", "training=3", words=["training", "3"]),
    setting("text for a number", "training.batch_size=big", words=["training.batch_size", "'big'"]),
    setting("zero batch", "training.batch_size=0", words=["training.batch_size", "0", "greater than or equal to 1"]),
    setting("half an image", "training.batch_size=1.5", words=["training.batch_size", "1.5"]),
    setting("negative learning rate", "training.learning_rate=-1", words=["training.learning_rate", "-1"]),
    setting("not a number", "training.learning_rate=.nan", words=["training.learning_rate", "nan", "finite"]),
    setting("infinite", "training.weight_decay=.inf", words=["training.weight_decay", "inf"]),
    setting("label dropout of 1", "training.label_dropout=1", words=["training.label_dropout", "less than 1"]),
    setting("betas of 1", "training.betas=[0.9, 1.0]", words=["betas", "1"]),
    setting("microbatch larger than batch", "training.microbatch_size=999", words=["microbatch_size", "999", "128"]),
    setting("zero time", "training.time_budget_s=0", words=["training.time_budget_s", "0"]),
    setting("unknown precision", "training.precision=float8", words=["training.precision", "float8", "bfloat16"]),
    setting("unknown schedule", "process.schedule=quartic", words=["process.schedule", "quartic", "cosine"]),
    setting("unknown prediction", "process.prediction=noise", words=["process.prediction", "noise", "epsilon"]),
    setting("one timestep", "process.timesteps=1", words=["process.timesteps", "1"]),
    setting("size that does not divide", "dataset.image_size=7", words=["7x7", "network.channel_multipliers"]),
    setting("attention at no level", "network.attention_resolutions=[5]", words=["attention_resolutions", "5"]),
    setting("no levels", "network.channel_multipliers=[]", words=["network.channel_multipliers"]),
    setting("heads that do not divide", "network.head_channels=24", words=["head_channels", "24"]),
    setting("image larger than the digits", "dataset.image_size=16", words=["dataset.image_size", "16", "8x8"]),
    setting("two channels", "dataset.channels=2", words=["dataset.channels", "2", "1 (grey) or 3"]),
    setting("name with a space", "name=my digits", words=["name", "my digits"]),
    setting("no held-out images", "dataset.test_fraction=0", words=["dataset.test_fraction", "0"]),
    setting("more steps than timesteps", "process.timesteps=20", words=["sampler.steps", "20 timesteps"]),
    setting(
        "hybrid without a learned variance", "training.objective.loss=hybrid", words=["objective.loss", "fixed_small"]
    ),
    setting(
        "a learned variance that nothing trains", "process.variance=learned_range", words=["objective.loss", "hybrid"]
    ),
    setting("unknown weighting", "training.objective.weighting=snr", words=["objective.weighting", "snr", "min_snr"]),
    setting("a weight of importance of 0", "training.objective.importance=[1, 0]", words=["objective.importance", "0"]),
    setting(
        "a bound of too many steps",
        "evaluation.likelihood={images: 9, steps: 2000}",
        words=["evaluation.likelihood.steps", "2000", "1000 timesteps"],
    ),
    setting("eta of ddpm", "generation.sampler={kind: ddpm, steps: 9, eta: 1}", words=["generation.sampler", "eta"]),
    setting("negative guidance", "generation.guidance.scale=-2", words=["generation.guidance.scale", "-2"]),
    setting("inception without weights", "evaluation.extractor=inception", words=["inception_weights"]),
    setting(
        "weights that are not there",
        "evaluation.extractor=inception",
        "evaluation.inception_weights={tmp}/none.pth",
        words=["inception_weights", "none.pth"],
    ),
    setting("unknown class", "generation.labels=[3, eleven]", words=["generation.labels", "eleven"]),
    setting("a label beyond the classes", "generation.labels=[10]", words=["generation.labels", "10"]),
    setting(
        "label file that is not there", "generation.labels={tmp}/none.txt", words=["generation.labels", "none.txt"]
    ),
    setting("unknown format", "generation.format=jpeg", words=["generation.format", "jpeg", "parquet"]),
    Case("count of 0", [*PIPELINE, "--count", "0"], ["generation.count", "0"]),
    Case("negative image id", [*PIPELINE, "--first-image-id", "-1"], ["generation.first_image_id", "-1"]),
    # Comparisons of samplers.
    comparing("unknown sampler", "--sampler", "euclid:9", words=["comparison.contestants", "'euclid'", "unipc"]),
    comparing("sampler without steps", "--sampler", "ddim", words=["comparison.contestants", "'ddim'", "KIND:STEPS"]),
    comparing("steps of a contestant", "--sampler", "ddim:51", words=["ddim:51", "sampler.steps", "50 timesteps"]),
    comparing("spacing that there is not", "--sampler", "ddim:9:karrass", words=["karrass", "trailing", "comparison"]),
    comparing("candidate that is none", "--candidate", "ddim:99", words=["candidate", "ddim:99", "ddpm:250"]),
    comparing("no seeds", "--seeds", "0", words=["comparison.seeds", "0", "greater than or equal to 1"]),
    comparing("two of one name", "--sampler", "ddim:9", "--sampler", "ddim:9", words=["two contestants", "ddim:9"]),
    comparing("dataset of another size", "--dataset", "larger", words=["4x4x1", "8x8x1", "cannot be compared"]),
    comparing("dataset that is not there", "--dataset", "cats", words=["--dataset", "cats", "toy"]),
    # Sources.
    Case("missing source", [*PIPELINE, "--source", "{tmp}/none"], ["source.uri", "{tmp}/none", "does not exist"]),
    Case("empty folder", [*PIPELINE, "--source", "{tmp}/empty"], ["source.uri", "{tmp}/empty", "empty"]),
    Case("empty file", [*PIPELINE, "--source", "{tmp}/empty.npz"], ["source.uri", "empty.npz", "empty"]),
    Case("folder without images", [*PIPELINE, "--source", "{tmp}/texts"], ["source.uri", "{tmp}/texts"]),
    Case("source of an unknown kind of place", [*PIPELINE, "--source", "ftp://x/y"], ["ftp://x/y"]),
    Case("kind without uri", [*PIPELINE, "--set", "source.kind=folder"], ["source", "uri"]),
    Case("shard without a source", ["shard", "--name", "x", "--store", "{store}"], ["--source"]),
    # Stores.
    Case("store is a file", ["pipeline", "-p", "digits", "--store", "{tmp}/file"], ["{tmp}/file", "file"]),
    Case("store below a file", ["pipeline", "-p", "digits", "--store", "{tmp}/file/x"], ["{tmp}/file"]),
    Case("store of an unknown kind", ["pipeline", "-p", "digits", "--store", "gs://b/x"], ["gs://b/x"]),
    Case(
        "S3 that does not answer",
        ["pipeline", "-p", "digits", "--store", "s3://bucket/x"],
        ["s3://bucket/x", "cannot be reached"],
        {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"},
    ),
    Case(
        "S3 source that does not answer",
        [*PIPELINE, "--source", "s3://bucket/x"],
        ["s3://bucket/x", "cannot be reached"],
        {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"},
    ),
    # Models, datasets and sets.
    Case("unknown model", ["generate", "--model", "models:/cats@champion", "--store", "{store}"], ["cats", "toy"]),
    Case("unknown alias", ["generate", "--model", "models:/toy@best", "--store", "{store}"], ["best", "candidate"]),
    Case("unknown version", ["generate", "--model", "models:/toy/9", "--store", "{store}"], ["toy", "9"]),
    Case("half a reference", ["generate", "--model", "models:/toy", "--store", "{store}"], ["models:/toy", "@alias"]),
    Case("no model", ["generate", "--store", "{store}"], ["--model", "models:/"]),
    Case("no bundle", ["generate", "--model", "{tmp}/empty", "--store", "{store}"], ["{tmp}/empty", "bundle"]),
    Case(
        "too many steps for the model",
        ["generate", "--model", "{bundle}", "--store", "{store}", "--steps", "51"],
        ["generation.sampler.steps", "51", "50"],
    ),
    Case(
        "class that the model has not",
        ["generate", "--model", "{bundle}", "--store", "{store}", "--labels", "cat,zebra"],
        ["generation.labels", "zebra", "cat, dog"],
    ),
    Case("unknown dataset", ["train", "--dataset", "cats", "--store", "{store}"], ["--dataset", "cats", "toy"]),
    Case("unknown dataset version", ["train", "--dataset", "toy/1", "--store", "{store}"], ["--dataset", "toy/1"]),
    Case("no dataset there", ["train", "--dataset", "{tmp}/empty", "--store", "{store}"], ["{tmp}/empty", "dataset"]),
    Case(
        "dataset that the network cannot halve",
        ["train", "--dataset", "toy", "--store", "{store}", "--set", "network.channel_multipliers=[1, 1, 1, 1]"],
        ["4x4", "network.channel_multipliers"],
    ),
    Case(
        "weights of another network",
        ["train", "--dataset", "toy", "--store", "{store}", "--init-from", "{bundle}"],
        ["training.init_from", "network.base_channels"],
    ),
    Case(
        "init_from with another prediction", [*FROM_BUNDLE, "--set", "process.prediction=v"], ["init_from", "predict v"]
    ),
    Case(
        "init_from with other channels",
        [*PIPELINE, "--init-from", "{bundle}", "--set", "dataset.channels=3", *SMALL],
        ["training.init_from", "1 channel", "3"],
    ),
    Case(
        "init_from an alias that the pipeline moves",
        [*PIPELINE, "--name", "toy", "--init-from", "models:/toy@candidate"],
        ["training.init_from", "models:/toy@candidate", "models:/toy/1"],
    ),
    Case("init_from nothing", [*PIPELINE, "--init-from", "models:/cats@champion"], ["cats"]),
    Case("promote to no version", ["promote", "toy", "9", "--store", "{store}"], ["toy", "9"]),
    Case("promote to version 0", ["promote", "toy", "0", "--store", "{store}"], ["0"]),
    Case("rollback without a champion", ["rollback", "toy", "--store", "{store}"], ["toy", "champion"]),
    Case("lineage of nothing", ["lineage", "no-such-thing", "--store", "{store}"], ["no-such-thing"]),
    Case("verify nothing", ["verify", "no-such-thing", "--store", "{store}"], ["no-such-thing"]),
    Case("reproduce nothing", ["reproduce", "no-such-thing", "--store", "{store}"], ["no-such-thing"]),
    # Resources and services.
    setting("no workers", "resources.train.workers=0", words=["resources.train.workers", "0"]),
    setting("more cores than there are", "resources.train.workers=4000", words=["resources.train.workers", "4000"]),
    Case(
        "more training workers than there are cores",
        ["train", "--dataset", "toy", "--store", "{store}", "--workers", "4000"],
        ["resources.train.workers", "4000"],
    ),
    Case(
        "more generating workers than there are cores",
        ["generate", "--model", "{bundle}", "--store", "{store}", "--workers", "4000"],
        ["resources.generate.workers", "4000"],
    ),
    Case(
        "GPUs that are not there",
        [*PIPELINE, "--set", "resources.train.gpus_per_worker=1"],
        ["resources.train.gpus_per_worker", "1", "no GPU"],
        {"CUDA_VISIBLE_DEVICES": ""},
    ),
    Case("unknown backend", [*PIPELINE, "--backend", "slurm"], ["backend.kind", "slurm", "local"]),
    Case("jobs without an address", [*PIPELINE, "--backend", "jobs"], ["backend.kind", "RAY_API_SERVER_ADDRESS"]),
    Case(
        "Jobs API that does not answer",
        [*PIPELINE, "--backend", "jobs"],
        ["RAY_API_SERVER_ADDRESS", "127.0.0.1:9"],
        {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"},
    ),
    Case("Ray that does not answer", PIPELINE, ["RAY_ADDRESS", "127.0.0.1:9"], {"RAY_ADDRESS": "127.0.0.1:9"}),
    Case(
        "MLflow that does not answer",
        PIPELINE,
        ["MLFLOW_TRACKING_URI", "127.0.0.1:9"],
        {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"},
    ),
    Case(
        "Prefect that does not answer",
        PIPELINE,
        ["PREFECT_API_URL", "127.0.0.1:9"],
        {"PREFECT_API_URL": "http://127.0.0.1:9/api"},
    ),
]

S3_CASES = [
    Case("missing bucket", ["pipeline", "-p", "digits", "--store", "s3://no-such-bucket/x"], ["no-such-bucket"]),
    Case(
        "wrong secret",
        ["pipeline", "-p", "digits", "--store", "s3://{bucket}/x"],
        ["s3://{bucket}/x"],
        {"AWS_SECRET_ACCESS_KEY": "wrong"},
    ),
    Case(
        "MLflow needs a server",
        ["pipeline", "-p", "digits", "--store", "s3://{bucket}/x"],
        ["s3://{bucket}/x", "MLFLOW_TRACKING_URI"],
    ),
    Case(
        "nothing at the source",
        [*PIPELINE, "--source", "s3://{bucket}/nothing"],
        ["source.uri", "s3://{bucket}/nothing"],
    ),
]

Ask = Callable[[list[str], dict[str, str]], dict[str, Any]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder with things to stumble over, and a store with a small dataset, a bundle and a registered model."""
    tmp = tmp_path_factory.mktemp("bad")
    for name in ("empty", "texts"):
        (tmp / name).mkdir()
    (tmp / "texts" / "read.me").write_text("no images here")
    (tmp / "empty.npz").touch()
    (tmp / "file").write_text("a file")
    files = {
        "broken": "training:\n  seed: [1, 2\n",
        "list": "- training\n",
        "twice": "preset: digits\ntraining:\n  seed: 1\n  seed: 2\n",
        "tag": "preset: !!python/object/apply:os.getcwd []\n",
        "section": "preset: digits\ntrainnig:\n  seed: 1\n",
        "field": "preset: digits\ntraining:\n  lerning_rate: 0.1\n",
        "preset": "preset: digits\n",
    }
    for name, text in files.items():
        (tmp / f"{name}.yaml").write_text(text)
    (tmp / "binary.yaml").write_bytes(bytes([0xFF, 0xFE, 0x00, 0x9F]) * 9)
    store = tmp / "store"
    return {"tmp": str(tmp), "store": str(store), "bundle": _furnish(str(store))}


def _furnish(store: str) -> str:
    """A dataset `toy` of 4x4 images, a bundle of a model for it, and a registered model `toy` with one version."""
    from diffusion_core.bundle import BundleConfig, DatasetReference, bundle_digest, save_bundle
    from diffusion_core.data.shards import Batch, write_dataset
    from diffusion_core.diffusion.config import ProcessConfig
    from diffusion_core.networks import build_network
    from diffusion_core.networks.config import UNetConfig
    from diffusion_core.store import Directory
    from diffusion_core.tracking.connection import client

    images = np.random.default_rng(SEED).integers(0, 256, (12, 4, 4, 1), dtype=np.uint8)
    labels = np.arange(12, dtype=np.int64) % 2
    splits = {"train": Batch(images[:8], labels[:8]), "test": Batch(images[8:], labels[8:])}
    dataset = write_dataset(store, "toy", splits, ["cat", "dog"])
    larger = {split: Batch(np.repeat(np.repeat(batch.images, 2, 1), 2, 2)) for split, batch in splits.items()}
    write_dataset(store, "larger", larger, [])
    network = UNetConfig(base_channels=8, channel_multipliers=(1,), blocks_per_level=1, head_channels=8)
    config = BundleConfig(
        process=ProcessConfig(timesteps=50),
        network=network,
        image_shape=(4, 4, 1),
        class_names=("cat", "dog"),
        dataset=DatasetReference(name="toy", version=dataset.version, uri=dataset.uri),
        run_id="run",
        images_seen=0,
    )
    place = Directory(store) / "runs/run/bundles/0"
    save_bundle(place, config, build_network(network, (4, 4, 1), 2).state_dict(), b"png")
    registry = client(store)
    registry.create_registered_model("toy")
    tags = {"bundle_digest": bundle_digest(place), "bundle_uri": place.uri}
    version = registry.create_model_version("toy", source=place.uri, tags=tags)
    registry.set_registered_model_alias("toy", "candidate", version.version)
    return place.uri


@pytest.fixture(scope="module")
def bucket(s3_server: SwiftServer) -> str:
    s3_server.make_bucket("bad-input")
    return "bad-input"


@pytest.fixture(scope="module")
def ask(world: dict[str, str]) -> Iterator[Ask]:
    """Runs the command in one process that has loaded nothing else."""
    driver = Path(__file__).parents[1] / "cli_driver.py"
    process = subprocess.Popen([sys.executable, driver], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None

    def question(arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
        asked = {"arguments": arguments, "environment": environment, "folder": world["tmp"]}
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        return dict(json.loads(process.stdout.readline()))

    yield question
    process.stdin.close()
    process.wait(10)


def check(case: Case, names: dict[str, str], answer: dict[str, Any]) -> None:
    sentence = answer["err"].strip()
    assert answer["status"] == 2, sentence
    assert answer["out"] == ""
    assert "Traceback" not in sentence
    assert len(sentence.splitlines()) == 1, sentence
    assert sentence.endswith("."), sentence
    assert len(sentence) < 400, sentence
    for word in case.words:
        assert word.format(**names) in sentence, sentence
    assert answer["loaded"] == []
    assert answer["cpu_seconds"] < 5
    assert answer["seconds"] < (5 if _idle() else 20)


def _idle() -> bool:
    """Nothing else competes for the cores, so that a limit in seconds means something."""
    return os.getloadavg()[0] < (os.cpu_count() or 1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Case, world: dict[str, str], ask: Ask) -> None:
    arguments = [_filled(argument, world) for argument in case.arguments]
    check(case, world, ask(arguments, case.environment))


@pytest.mark.parametrize("case", S3_CASES, ids=lambda case: case.name)
def test_bad_input_on_s3(case: Case, world: dict[str, str], ask: Ask, s3_server: SwiftServer, bucket: str) -> None:
    names = {**world, "bucket": bucket}
    arguments = [_filled(argument, names) for argument in case.arguments]
    check(case, names, ask(arguments, {**s3_server.environment, **case.environment}))


def _filled(argument: str, names: dict[str, str]) -> str:
    """Like `format`, but other braces (YAML has them) stay."""
    for name, value in names.items():
        argument = argument.replace(f"{{{name}}}", value)
    return argument


def test_there_are_at_least_46_kinds() -> None:
    assert len({case.name for case in [*CASES, *S3_CASES]}) >= 46


@pytest.mark.parametrize(
    "arguments",
    [["pipeline", "-p", "digitz"], ["pipeline", "-p", "digits", "--set", "dataset.image_size=7"], ["train", "--nope"]],
    ids=" ".join,
)
def test_as_a_process_of_its_own(arguments: list[str], tmp_path: Path) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments], cwd=tmp_path, env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""
    assert time.monotonic() - started < (5 if _idle() else 20)
    assert list(tmp_path.iterdir()) == []


def test_a_job_says_the_users_mistake_in_one_sentence(tmp_path: Path) -> None:
    """What only a job can find out comes back from it as the same kind of sentence."""
    from diffusion_core.jobs.backend import BackendConfig, run_job
    from diffusion_core.stages.generate import GenerateRequest, GenerateResult

    request = GenerateRequest(store=str(tmp_path / "store"), model=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="bundle"):
        run_job("generate", request, GenerateResult, BackendConfig())
