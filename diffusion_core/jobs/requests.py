"""The typed request and result of every job. Flows and the command know these and nothing else of a job."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from diffusion_core.config import Config, execution
from diffusion_core.data.config import DatasetConfig, SourceConfig
from diffusion_core.diffusion.config import ProcessConfig
from diffusion_core.evaluation.comparison import Comparison
from diffusion_core.evaluation.config import ComparisonConfig, EvaluationConfig, GateConfig
from diffusion_core.generation.config import GenerationConfig
from diffusion_core.networks.config import NetworkConfig, UNetConfig
from diffusion_core.tracking.approval import Question
from diffusion_core.training.config import TrainingConfig


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


class Result(Config):
    """What every job answers."""

    seconds: float = Field(description="Wall-clock seconds that the job took.")
    reused: bool = Field(description="True if the work was found done, so that nothing was computed.")


class ShardRequest(Request):
    source: SourceConfig
    dataset: DatasetConfig


class ShardResult(Result):
    uri: str = Field(description="URI of the dataset version.")
    version: str
    splits: dict[str, int] = Field(description="Rows of each split.")
    rejected: int = Field(description="Items of the source that were not taken; rejected.parquet says why.")
    shards: int


class TrainRequest(Request):
    dataset_uri: str = Field(description="URI of the dataset version to train on.")
    process: ProcessConfig = ProcessConfig()
    network: NetworkConfig = UNetConfig()
    training: TrainingConfig = TrainingConfig()
    experiment: str = execution("diffusion", description="MLflow experiment that records the run.")


class TrainResult(Result):
    run_id: str
    run_uri: str
    bundle_uri: str = Field(description="URI of the exported model bundle.")
    images_seen: int
    loss: float = Field(description="Mean training loss over the last logging interval.")
    images_per_second: float
    mlflow_run_id: str


class EvaluateRequest(Request):
    bundle_uri: str
    dataset_uri: str
    evaluation: EvaluationConfig = EvaluationConfig()
    mlflow_run_id: str | None = execution(None, description="MLflow run to which the figures are attached.")


class EvaluateResult(Result):
    uri: str = Field(description="URI of the report, evaluation.json.")
    figures: dict[str, float] = Field(description="Figures of the generated images.")
    floor: dict[str, float] = Field(description="The same figures for held-out real images, with equal N.")


class CompareRequest(Request):
    bundle_uri: str
    dataset_uri: str
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="How images are measured.")
    comparison: ComparisonConfig = ComparisonConfig()


class CompareResult(Result):
    uri: str = Field(description="URI of the report, comparison.json.")
    table: str = Field(description="URI of the table, comparison.md.")
    picture: str = Field(description="URI of the plot, comparison.png.")
    cells: int = Field(description="Contestants times seeds.")
    made: int = Field(description="Cells that this job made; the others were found done.")
    comparison: Comparison


class RegisterRequest(Request):
    model: str = Field(description="Name of the registered model.")
    bundle_uri: str
    dataset_uri: str
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()
    mlflow_run_id: str | None = execution(None, description="MLflow run that trained the bundle; default: its own.")


class RegisterResult(Result):
    model: str
    version: int
    promoted: bool = Field(description="True if this version holds the alias champion after the gate.")
    reason: str = Field(description="One sentence: why the gate let it pass, or not.")
    figures: dict[str, Any] = Field(description="The comparison that the gate made.")
    previous: int | None = Field(None, description="The champion before this one, if this one is the champion.")
    question: Question | None = Field(None, description="What a person has to answer before the gate can conclude.")


class GenerateRequest(Request):
    model: str = Field(description="models:/name@alias, models:/name/version, or the URI of a bundle.")
    generation: GenerationConfig = GenerationConfig()


class GenerateResult(Result):
    set_id: str
    uri: str
    model_version: str = Field(description="The model version that the reference was resolved to.")
    images: int = Field(description="Images of this request's range, all of them stored.")
    generated: int = Field(description="Images that this job made; the others were found done.")
    first_image_id: int
    contact_sheet: str
    total_images: int = Field(description="Images in the whole set.")
    images_per_second: float
