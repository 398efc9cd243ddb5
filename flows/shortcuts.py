"""What the options of the command stand for: fields of the configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_core.config import UserError
from flows.config import PipelineConfig, StageResources
from flows.settings import load_config, preset_names, seconds
from flows.stack import services

FIELDS = {
    "store": "store",
    "name": "name",
    "images": "training.images",
    "batch_size": "training.batch_size",
    "init_from": "training.init_from",
    "samples": "evaluation.samples",
    "count": "generation.count",
    "first_image_id": "generation.first_image_id",
    "sampler": "generation.sampler.kind",
    "steps": "generation.sampler.steps",
    "guidance": "generation.guidance.scale",
    "seed": "generation.seed",
    "format": "generation.format",
    "contestants": "comparison.contestants",
    "reference": "comparison.reference",
    "candidate": "comparison.candidate",
    "seeds": "comparison.seeds",
    "compared_images": "comparison.images",
    "compared_guidance": "comparison.guidance.scale",
    "backend": "backend.kind",
}


def load(
    preset: str | None, file: str | None, settings: Sequence[str], source_needed: bool, given: Mapping[str, Any]
) -> PipelineConfig:
    """The configuration of a verb. A verb that reads no source (`source_needed=False`) does without one."""
    if source_needed and not (
        preset or file or given.get("source") or any(item.startswith("source.") for item in settings)
    ):
        raise UserError(
            f"Say what to work on: --preset ({', '.join(preset_names())}), --config FILE, or --source with --name."
        )
    shortcuts = {FIELDS[option]: value for option, value in given.items() if option in FIELDS}
    shortcuts.update(_source(given.get("source")))
    shortcuts["dataset.image_size"] = _image_size(given.get("image_size"))
    if given.get("time_budget") is not None:
        shortcuts["training.time_budget_s"] = seconds(given["time_budget"])
    if given.get("workers") is not None:
        shortcuts.update({f"resources.{stage}.workers": given["workers"] for stage in StageResources.model_fields})
    if given.get("labels") is not None:
        shortcuts["generation.labels"] = _labels(given["labels"])
    if given.get("contestants"):  # a preset's reference and candidate are among its own contestants
        settings = ["comparison.reference=null", "comparison.candidate=null", *settings]
    unneeded = None if source_needed else {"name": "diffusion", "source": {"kind": "digits"}}
    config = load_config(preset, file, settings, shortcuts, unneeded)
    services.adopt(config.store)
    return config


def _source(source: str | None) -> dict[str, Any]:
    if source is None:
        return {}
    return {"source": {"kind": "digits"}} if source == "digits" else {"source.uri": source}


def _image_size(text: str | None) -> Any:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise UserError(f"--image-size {text}: give pixels, as 32, or height and width, as 32x48.")
    return [int(match[1]), int(match[2])] if match[2] else int(match[1])


def _labels(text: str) -> Any:
    """`balanced` and paths stay text; anything else is a list of classes."""
    if text == "balanced" or "/" in text or re.search(r"\.(txt|csv|jsonl|parquet)$", text):
        return text
    return [int(entry) if entry.strip().isdecimal() else entry.strip() for entry in text.split(",")]
