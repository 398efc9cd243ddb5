"""Whether a pipeline changed anything, and since when not: what the log, the report and the command say at its end.

An outcome (dataset version, bundle, figures, model version) is noted in `<store>/outcomes/<name>/<digest>.json` when a
pipeline comes to it for the first time.
"""

from __future__ import annotations

from datetime import UTC, datetime

from diffusion_core.config import digest
from diffusion_core.stages.pipeline import PipelineResult
from diffusion_core.store import Directory, layout


def news(result: PipelineResult) -> str:
    """One sentence: what was done, or that nothing changed since this very outcome was reached."""
    outcome = {
        "dataset": result.dataset.uri,
        "bundle": result.run.bundle_uri,
        "evaluation": result.evaluation.uri,
        "model": result.version.reference,
    }
    store, key = Directory(result.store), layout.outcome(result.name, digest(outcome))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    if store.create_json(key, {"schema_version": 1, "ended": now, **outcome}):
        done = [name for name, stage in result.stages.items() if not stage.reused]
        return f"Done: {', '.join(done) or 'nothing, all of it was found done'}."
    since = datetime.fromisoformat(store.read_json(key)["ended"]).strftime("%Y-%m-%d %H:%M UTC")
    images = f"{result.images.generated:,} new images" if result.images.generated else "no new images"
    return f"Nothing changed since {since}; {images}."
