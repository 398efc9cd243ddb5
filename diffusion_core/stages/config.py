"""The configuration of a whole pipeline: the components' own configurations, side by side. Light: no heavy import."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from diffusion_core.config import Config, execution
from diffusion_core.data.config import DatasetConfig, SourceConfig
from diffusion_core.diffusion.config import ProcessConfig
from diffusion_core.evaluation.config import ComparisonConfig, EvaluationConfig, GateConfig
from diffusion_core.generation.config import GenerationConfig
from diffusion_core.jobs.backend import BackendConfig
from diffusion_core.jobs.request import Resources
from diffusion_core.networks.config import NetworkConfig, UNetConfig
from diffusion_core.training.config import TrainingConfig


class StageResources(Config):
    """The Ray workers of each stage."""

    shard: Resources = execution(default_factory=Resources, description="Workers that decode and write shards.")
    train: Resources = execution(default_factory=Resources, description="Training workers (data parallel).")
    evaluate: Resources = execution(default_factory=Resources, description="Workers that sample for the figures.")
    generate: Resources = execution(default_factory=Resources, description="Workers that generate images.")


class PipelineConfig(Config):
    """Images in, a dataset version, a trained and evaluated model version, and a set of generated images out."""

    name: str = execution(
        pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$",
        description="Name of the dataset, the experiment and the registered model.",
    )
    store: str = execution(
        "store", min_length=1, description="Root of the store: a local folder or s3://bucket/prefix."
    )
    source: SourceConfig = Field(description="Where the images come from.")
    dataset: DatasetConfig = Field(description="How they become a dataset version; its name is the pipeline's.")
    process: ProcessConfig = Field(default_factory=ProcessConfig, description="The diffusion process.")
    network: NetworkConfig = Field(default_factory=UNetConfig, description="The network.")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="How the network is trained.")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="How the model is measured.")
    comparison: ComparisonConfig = Field(
        default_factory=ComparisonConfig, description="Which samplers compare-samplers compares, and how."
    )
    gate: GateConfig = Field(default_factory=GateConfig, description="When the new version becomes the champion.")
    generation: GenerationConfig = Field(default_factory=GenerationConfig, description="The images to make.")
    resources: StageResources = execution(default_factory=StageResources, description="Workers of each stage.")
    backend: BackendConfig = execution(default_factory=BackendConfig, description="Where the jobs run.")

    @model_validator(mode="before")
    @classmethod
    def _one_name_for_all(cls, values: Any) -> Any:
        """The dataset is named like the pipeline unless it has a name of its own."""
        if not isinstance(values, dict) or "name" not in values:
            return values
        dataset = values.get("dataset", {})
        if isinstance(dataset, dict) and "name" not in dataset:
            return {**values, "dataset": {"name": values["name"], **dataset}}
        return values
