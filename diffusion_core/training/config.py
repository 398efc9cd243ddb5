"""How a network is trained. Light on purpose: requests, flows and the command read it without importing torch."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field, model_validator

from diffusion_core.config import Config, execution, later
from diffusion_core.diffusion.kinds import Choice
from diffusion_core.diffusion.objective_config import ObjectiveConfig


class Precision(StrEnum):
    """Arithmetic of the forward and backward pass. Weights, optimizer, loss and moving average are float32 always."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


# The standard deviation of an average's profile over the length of training; a uniform average has 0.289.
RelativeWidth = Annotated[float, Field(ge=0.01, le=0.28)]


class EmaKind(Choice):
    """How the weights are averaged over the steps of training."""

    HALFLIFE = "halflife", "a fixed half-life in images, shorter while training is young (Karras et al. 2022)"
    POWER = "power", "a fixed share of the whole training, whose length can be chosen again later (Karras et al. 2024)"


class TrainingConfig(Config):
    """The objective, its optimizer, its batches and its randomness (identity), and how long and visibly to train."""

    batch_size: int = Field(128, ge=1, le=1_048_576, description="Images of one optimizer step, over all workers.")
    microbatch_size: int = Field(
        64,
        ge=1,
        le=65_536,
        description="Images of one forward and backward pass. A batch is a fixed list of microbatches, dealt over the"
        " workers; the last one may be smaller.",
    )
    objective: ObjectiveConfig = later(ObjectiveConfig(), description="The loss, its weights, and the times it is at.")
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Learning rate of AdamW after the warm-up; constant.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Decay rates of AdamW's two moments, each in [0, 1).")
    weight_decay: float = Field(0.0, ge=0, le=10, description="Decoupled weight decay of AdamW.")
    warmup_images: int = Field(10_000, ge=0, description="Images over which the learning rate rises from 0 linearly.")
    grad_clip: float | None = Field(1.0, gt=0, description="Greatest gradient norm; none means no clipping.")
    ema_halflife_images: int = Field(
        500_000, ge=1, description="Half-life of the moving average of the weights, in images."
    )
    ema_rampup_ratio: float | None = Field(
        0.05,
        gt=0,
        le=1,
        description="While training is young the half-life is at most this share of the images seen; none switches the"
        " ramp off.",
    )
    ema: EmaKind = later(EmaKind.HALFLIFE, description=f"Moving average of the weights. {EmaKind.explained()}")
    ema_sigma_rels: tuple[RelativeWidth, RelativeWidth] = later(
        (0.05, 0.1),
        description="Moving average power only: relative widths (sigma_rel) of the two averages that are kept. The"
        " finished bundle holds the first; diffusion export makes one of any other width out of both.",
    )
    label_dropout: float = Field(
        0.1, ge=0, lt=1, description="Share of labels replaced by the null label, so that guidance can be used."
    )
    precision: Precision = Field(Precision.FLOAT32, description="Arithmetic of the forward and backward pass.")
    compile: bool = Field(False, description="Compile the network with torch.compile (faster steps, slower start).")
    channels_last: bool = Field(
        False, description="Keep images and weights in the channels-last memory format: faster on GPUs, not on CPUs."
    )
    threads: int = Field(1, ge=1, le=1024, description="CPU threads of each worker; they change the order of sums.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the weights, shuffle, noise, timesteps and dropout.")
    horizontal_flip: bool = Field(False, description="Mirror half of the images, chosen anew in each epoch.")
    init_from: str | None = execution(
        None,
        min_length=1,
        description="Model (name@alias, run or bundle) whose weights training starts from. The digest of its bundle,"
        " not its name, is part of the run's id.",
    )

    images: int = execution(1_000_000, ge=1, description="Train until this many images were seen, over all attempts.")
    time_budget_s: float | None = execution(
        None, gt=0, description="Stop after this many seconds of training, over all attempts; none means no limit."
    )
    checkpoint_every_images: int = execution(50_000, ge=1, description="Images between two checkpoints.")
    keep_checkpoints: int = execution(3, ge=1, le=1000, description="Newest checkpoints to keep; older ones go.")
    ema_snapshot_every_images: int = execution(
        100_000,
        ge=1,
        description="Moving average power only: images between two snapshots of the averages, at first. Where it is"
        " changed in mid-run, those from before that are not on the new grid go.",
    )
    ema_keep_snapshots: int = execution(
        16,
        ge=4,
        le=1000,
        description="Moving average power only: most snapshots to keep; where there are more, every second one goes and"
        " the distance doubles.",
    )
    preview_every_images: int = execution(
        200_000, ge=0, description="Images between two sample grids; 0 makes one at the end only."
    )
    preview_images: int = execution(36, ge=1, le=256, description="Images in a sample grid.")
    preview_steps: int = execution(25, ge=1, le=1000, description="DDIM steps of a sample grid.")
    log_every_images: int = execution(5_000, ge=1, description="Images between two recordings of the figures.")
    memory_budget_mb: int = execution(
        2048, ge=1, description="A dataset up to this many MiB stays in each worker's memory; a larger one streams."
    )

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.microbatch_size > self.batch_size:
            raise ValueError(
                f"microbatch_size {self.microbatch_size} must be at most batch_size, which is {self.batch_size}"
            )
        if self.ema is EmaKind.HALFLIFE and self.ema_sigma_rels != (0.05, 0.1):
            raise ValueError("ema_sigma_rels is for the moving average power only: leave it out for halflife")
        if self.ema_sigma_rels[0] == self.ema_sigma_rels[1]:
            raise ValueError(f"ema_sigma_rels {list(self.ema_sigma_rels)} must be two different widths")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)} must both lie in [0, 1)")
        return self

    @property
    def target_images(self) -> int:
        """`images` rounded up to whole batches: where training really ends."""
        return -(-self.images // self.batch_size) * self.batch_size
