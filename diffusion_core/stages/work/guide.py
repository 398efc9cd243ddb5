"""The other models that take part in guidance: found by their references, and known by their content."""

from __future__ import annotations

from diffusion_core.bundle import bundle_digest
from diffusion_core.catalog import find
from diffusion_core.diffusion.config import GuidanceConfig


def with_guides_found(guidance: GuidanceConfig, store: str) -> GuidanceConfig:
    """The guidance with the URIs of bundles in place of references."""
    found = {name: find.bundle_uri(reference, store) for name, reference in guidance.models.items()}
    return guidance.model_copy(update=found)


def guide_digests(guidance: GuidanceConfig) -> dict[str, str]:
    """The digests of the bundles that take part, by the names of their fields; `UserError` if one is not there."""
    return {name: bundle_digest(uri) for name, uri in guidance.models.items()}
