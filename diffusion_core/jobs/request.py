"""What the typed request and the typed result of every job have in common. Each stage has its own."""

from __future__ import annotations

from pydantic import Field

from diffusion_core.config import Config, execution


class Resources(Config):
    """Where the Ray workers of one job run. Nothing here changes a number in the result."""

    workers: int = execution(2, ge=1, le=4096, description="Number of worker processes.")
    cpus_per_worker: float = execution(1, gt=0, description="CPU cores reserved for each worker.")
    gpus_per_worker: float = execution(0, ge=0, description="GPUs reserved for each worker (a fraction shares one).")
    accelerator_type: str | None = execution(None, description="Ray accelerator type that each worker needs, as H100.")
    spread: bool = execution(True, description="Spread the workers over nodes instead of packing them.")
    start_timeout_s: float = execution(
        120, gt=0, description="Seconds to wait for these resources before the job fails and names what is missing."
    )
    max_failures: int = execution(3, ge=0, description="Worker failures to recover from before the job fails.")


class Request(Config):
    """What every job is told."""

    store: str = execution(description="Root of the store: a local folder or s3://bucket/prefix.")
    resources: Resources = execution(default_factory=Resources)
    asked_by: str | None = execution(None, description="Id of the Prefect flow run that asked for it.")


class Result(Config):
    """What every job answers."""

    seconds: float = Field(description="Wall-clock seconds that the job took.")
    reused: bool = Field(description="True if the work was found done, so that nothing was computed.")
