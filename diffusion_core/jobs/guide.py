"""The weaker model of autoguidance, found by its reference."""

from __future__ import annotations

from diffusion_core.diffusion.config import GuidanceConfig


def with_guide_found(guidance: GuidanceConfig, store: str) -> GuidanceConfig:
    """The guidance with the URI of its guide's bundle in place of a model reference."""
    if guidance.guide is None or not guidance.guide.startswith("models:/"):
        return guidance
    from diffusion_core.tracking import resolve_model

    return guidance.model_copy(update={"guide": resolve_model(guidance.guide, store).bundle_uri})
