"""What makes a pipeline so small that it takes a minute, on the bundled digits or on pictures of a test's own."""

from __future__ import annotations

COUNT = 32
SETTINGS = [
    "training.images=640",
    "training.log_every_images=128",
    "training.checkpoint_every_images=320",
    "training.preview_every_images=0",
    "network.base_channels=16",
    "network.head_channels=16",
    "network.blocks_per_level=1",
    "evaluation.samples=32",
    "evaluation.sampler.steps=4",
    "evaluation.classifier.images=2000",
    "evaluation.kid_subset_size=16",
    "gate.resamples=20",
    "gate.first_limit=100000000",
    "gate.min_accuracy=null",
    "generation.sampler.steps=4",
    f"generation.count={COUNT}",
    "generation.images_per_shard=16",
    "generation.batch_size=16",
    *(f"resources.{stage}.workers=1" for stage in ("shard", "evaluate", "generate")),  # each worker loads torch anew
]
