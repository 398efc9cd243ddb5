"""The other models that take part in guidance: found by their references, and known by their content."""

from __future__ import annotations

from diffusion_core.bundle import bundle_digest
from diffusion_core.diffusion.config import GuidanceConfig


def with_guides_found(guidance: GuidanceConfig, store: str) -> GuidanceConfig:
    """The guidance with the URIs of bundles in place of model references."""
    references = {name: uri for name, uri in guidance.models.items() if uri.startswith("models:/")}
    if not references:
        return guidance
    from diffusion_core.tracking import resolve_model

    return guidance.model_copy(
        update={name: resolve_model(reference, store).bundle_uri for name, reference in references.items()}
    )


def guide_digests(guidance: GuidanceConfig) -> dict[str, str]:
    """The digests of the bundles that take part, by the names of their fields; `UserError` if one is not there."""
    return {name: bundle_digest(uri) for name, uri in guidance.models.items()}
