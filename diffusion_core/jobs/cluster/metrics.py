"""Figures of a running job for Prometheus, through the metrics endpoint of the Ray node that the job runs on.

Ray puts `ray_` before each name, and `_total` after that of a counter. Labels: the stage, and the id of the job.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from functools import lru_cache
from typing import Any

from diffusion_core.jobs import context
from diffusion_core.progress import ProgressEvent

LABELS = ("stage", "job_id")


class Counter(StrEnum):
    """What a job did, growing."""

    images = "diffusion_images"
    shards = "diffusion_shards"
    rejected = "diffusion_rejected"
    retries = "diffusion_retries"


class Gauge(StrEnum):
    """How a job is at the moment."""

    images_per_second = "diffusion_images_per_second"
    data_wait_share = "diffusion_data_wait_share"
    queue_length = "diffusion_queue_length"


DESCRIPTIONS = {
    Counter.images: "Images that the job has worked on.",
    Counter.shards: "Shards, or other parts of the work, that the job has done.",
    Counter.rejected: "Items of a source that were not taken.",
    Counter.retries: "Parts of the work that are tried again.",
    Gauge.images_per_second: "Images in a second, over the last half minute.",
    Gauge.data_wait_share: "Share of the time that training waits for data.",
    Gauge.queue_length: "Parts of the work that are not done yet.",
}


def count(counter: Counter, by: float = 1) -> None:
    """Add to a counter; nothing happens in a process that has no Ray."""
    if by > 0 and (made := _made(counter)):
        made.inc(by)


def show(gauge: Gauge, value: float) -> None:
    """Set a gauge; nothing happens in a process that has no Ray."""
    if made := _made(gauge):
        made.set(value)


def of_progress(event: ProgressEvent, new: float) -> None:
    """The figures that a progress line holds."""
    if event.unit == "images":
        count(Counter.images, new)
        if event.rate is not None:
            show(Gauge.images_per_second, event.rate)
    if (waited := event.figures.get(Gauge.data_wait_share.removeprefix("diffusion_"))) is not None:
        show(Gauge.data_wait_share, waited)


def _made(metric: Counter | Gauge) -> Any:
    ray = sys.modules.get("ray")
    return _make(metric) if ray is not None and ray.is_initialized() else None


@lru_cache
def _make(metric: Counter | Gauge) -> Any:
    from ray.util import metrics

    kind = metrics.Counter if isinstance(metric, Counter) else metrics.Gauge
    made = kind(metric.value, description=DESCRIPTIONS[metric], tag_keys=LABELS)
    job = context.current()
    made.set_default_tags({"stage": job.stage, "job_id": job.job_id})
    return made
