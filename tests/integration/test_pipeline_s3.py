"""The whole pipeline on object storage: a folder of 200 pictures, three of them broken, in one bucket and out again."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffusion_core.data import open_dataset
from diffusion_core.generation import open_imageset
from diffusion_core.store import Directory
from tests.swift_server import SECRET_KEY

BROKEN = {"circle/017.png": "truncated", "circle/055.jpg": "empty", "square/101.png": "no picture"}
SETTINGS = [
    "dataset.channels=1",
    "network.base_channels=16",
    "network.head_channels=16",
    "network.channel_multipliers=[1,2]",
    "network.blocks_per_level=1",
    "training.batch_size=64",
    "training.microbatch_size=32",
    "training.images=320",
    "training.preview_every_images=0",
    "evaluation.samples=20",
    "evaluation.sampler.steps=4",
    "evaluation.classifier.images=1000",
    "evaluation.kid_subset_size=10",
    "gate.resamples=20",
    "gate.first_limit=100000000",
    "generation.sampler.steps=4",
    "generation.count=24",
    "generation.images_per_shard=8",
    "generation.batch_size=8",
]


@pytest.mark.timeout(500)
@pytest.mark.slow
def test_a_folder_on_s3_becomes_an_image_set_on_s3(
    prefect_server: None,
    ray_cluster: object,
    s3_store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from flows.cli import main

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    source = Directory(s3_store.rpartition("/")[0]) / "pictures"
    for key, data in _pictures().items():
        source.write(key, data)
    options = ["--source", source.uri, "--store", s3_store, "--name", "shapes", "--image-size", "16", "--json"]
    options += [part for setting in SETTINGS for part in ("--set", setting)]
    status = main(["pipeline", *options])
    output = capsys.readouterr()
    assert status == 0, output.err
    result = json.loads(output.out)

    assert result["dataset"]["rejected"] == 3
    assert sum(result["dataset"]["splits"].values()) == 197
    dataset = open_dataset(result["dataset"]["uri"])
    assert list(dataset.class_names) == ["circle", "square"]
    with Directory(dataset.uri).open("rejected.parquet") as file:
        rejected = pq.read_table(file).to_pylist()
    assert {row["key"] for row in rejected} == set(BROKEN)
    assert all(row["reason"] for row in rejected)

    images, labels = open_imageset(result["images"]["uri"]).read(0, 24)
    assert images.shape == (24, 16, 16, 1)
    assert labels.tolist() == [0, 1] * 12
    assert result["version"]["promoted"]
    place = Directory(s3_store)
    written = [output.out.encode(), output.err.encode(), *(place.read(entry.key) for entry in place.list())]
    written.append((tmp_path / "mlflow.db").read_bytes())
    assert not [text for text in written if SECRET_KEY.encode() in text]


def _pictures() -> dict[str, bytes]:
    """200 PNG and JPEG files of circles and squares, three of them broken."""
    random = np.random.default_rng(0)
    files = {}
    for number in range(200):
        shape, ending = ("circle", "square")[number >= 100], ("png", "jpg")[number % 3 == 1]
        files[f"{shape}/{number:03d}.{ending}"] = _picture(shape, ending, random)
    whole = files["circle/017.png"]
    files["circle/017.png"] = whole[: len(whole) // 2]
    files["circle/055.jpg"] = b""
    files["square/101.png"] = b"This is a text."
    return files


def _picture(shape: str, ending: str, random: np.random.Generator) -> bytes:
    y, x = np.mgrid[:24, :32] - random.uniform(10, 14, (2, 1, 1))
    size = random.uniform(4, 8)
    inside = x**2 + y**2 < size**2 if shape == "circle" else (abs(x) < size) & (abs(y) < size)
    pixels = np.where(inside[..., None], random.integers(150, 256, 3), random.integers(0, 80, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, {"png": "PNG", "jpg": "JPEG"}[ending])
    return file.getvalue()
