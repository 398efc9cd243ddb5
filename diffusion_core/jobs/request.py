"""What the typed request and the typed result of every job have in common. Each stage has its own."""

from __future__ import annotations

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from diffusion_core.config import Config, execution
from diffusion_core.tracking.flow_run import FlowRun


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
    asked_by: SkipJsonSchema[FlowRun | None] = execution(None, description="The Prefect flow run that asked for it.")


class Account(Config):
    """What one job took, its workers included."""

    seconds: float = Field(description="Wall-clock seconds of the job's program.")
    cpu_seconds: float = Field(description="CPU seconds of the program, of its children and of its workers.")
    gpu_seconds: float = Field(description="Seconds that GPUs were reserved, times their number.")
    images: int = Field(description="Images that this job worked on, those found done apart.")
    bytes_written: int = Field(description="Bytes handed to the store.")
    s3_requests: int = Field(description="Requests to S3, repeated ones included; 0 for a local store.")


class Result(Config):
    """What every job answers."""

    seconds: float = Field(description="Wall-clock seconds that the job took.")
    reused: bool = Field(description="True if the work was found done, so that nothing was computed.")
    job: str | None = Field(None, description="URI of the job's files; its last part is the job's id.")
    account: Account | None = Field(None, description="What the job took; None in results of before it was counted.")
