"""Configuration of the training objective. Nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, model_validator

from diffusion_core.config import Config, UserError
from diffusion_core.diffusion.config import ProcessConfig
from diffusion_core.diffusion.kinds import Choice, ScheduleKind, Variance


class LossKind(Choice):
    """What is made small."""

    SIMPLE = "simple", "mean squared error of what the network predicts (Ho et al. 2020)"
    HYBRID = "hybrid", "simple, and the bound for the learned variance alone (Nichol & Dhariwal 2021)"
    VLB = "vlb", "the variational bound of the likelihood, in bits per dimension (Ho et al. 2020)"


class Weighting(Choice):
    """How much the simple loss counts at each time, whatever the network predicts."""

    NONE = "none", "as it is; for the prediction edm this is the loss of Karras et al. 2022"
    MIN_SNR = "min_snr", "that of x0 counts min(SNR, min_snr_gamma) (Hang et al. 2023)"
    P2 = "p2", "that of the noise counts 1 / (p2_k + SNR)^p2_gamma (Choi et al. 2022)"
    EDM = "edm", "that of x0 counts SNR + 1 / sigma_data^2 (Karras et al. 2022)"


class TimeDraw(Choice):
    """How times are drawn in training."""

    SCHEDULE = "schedule", "evenly; for the schedule edm log-normally, by time_mean and time_std"
    LOGIT_NORMAL = (
        "logit_normal",
        "schedule flow only: logit(t) is normal, by time_mean and time_std (Esser et al. 2024)",
    )
    IMPORTANCE = "importance", "by the table `importance`; the loss is weighted so that its mean stays the same"


class ObjectiveConfig(Config):
    """What is learned from an image at a time, and which times are drawn."""

    loss: LossKind = Field(LossKind.SIMPLE, description=f"Loss. {LossKind.explained()}")
    bound_weight: float = Field(
        0.001, gt=0, le=1e3, description="Hybrid only: lambda, the weight of the bound in bits per dimension."
    )
    weighting: Weighting = Field(
        Weighting.NONE, description=f"Weighting of the simple loss over times. {Weighting.explained()}"
    )
    min_snr_gamma: float = Field(5.0, gt=0, le=1e6, description="Weighting min_snr only: the greatest weight of x0.")
    p2_gamma: float = Field(1.0, ge=0, le=10, description="Weighting p2 only: how strongly low noise is passed over.")
    p2_k: float = Field(1.0, gt=0, le=1e3, description="Weighting p2 only: keeps the weight finite at much noise.")
    times: TimeDraw = Field(TimeDraw.SCHEDULE, description=f"Times of training. {TimeDraw.explained()}")
    time_mean: float | None = Field(
        None,
        ge=-20,
        le=20,
        description="Mean of log(sigma) for the schedule edm (P_mean of Karras et al. 2022; default -1.2), or of "
        "logit(t) for logit_normal (default 0).",
    )
    time_std: float | None = Field(
        None,
        gt=0,
        le=20,
        description="Standard deviation of the same (P_std; default 1.2 for edm, 1 for logit_normal).",
    )
    importance: tuple[Annotated[float, Field(ge=1e-6, le=1e6)], ...] = Field(
        (),
        max_length=4096,
        description="Times importance only: how often each of equal ranges of timesteps is drawn, the least noise "
        "first, in any unit; best are the root mean squares of the loss there (Nichol & Dhariwal 2021, section 3.3), "
        "which an evaluation with evaluation.likelihood.steps = process.timesteps reports of a trained model.",
    )

    @model_validator(mode="after")
    def _options_belong_to_the_choice(self) -> ObjectiveConfig:
        for name, field, owner in (
            ("bound_weight", "loss", LossKind.HYBRID),
            ("min_snr_gamma", "weighting", Weighting.MIN_SNR),
            ("p2_gamma", "weighting", Weighting.P2),
            ("p2_k", "weighting", Weighting.P2),
            ("importance", "times", TimeDraw.IMPORTANCE),
        ):
            default = type(self).model_fields[name].default
            if getattr(self, name) != default and getattr(self, field) is not owner:
                raise ValueError(f"{name} is for the {field} {owner} only: leave it at its default")
        if self.times is TimeDraw.IMPORTANCE and len(self.importance) < 2:
            raise ValueError("times importance needs the table importance, of at least two numbers")
        if self.loss is LossKind.VLB and self.weighting is not Weighting.NONE:
            raise ValueError(
                f"weighting {self.weighting} is not accepted with the loss vlb, which has its own: use none"
            )
        return self


def check_objective(field: str, objective: ObjectiveConfig, process: ProcessConfig) -> None:
    """An objective suits the process that is trained.

    Args:
        field: path of the objective's configuration, for the message.

    Raises:
        UserError: naming the two fields that do not go together.
    """
    learned = process.variance is Variance.LEARNED_RANGE
    if learned and objective.loss is LossKind.SIMPLE:
        raise UserError(f"{field}.loss: simple does not train the process.variance learned_range: use hybrid or vlb.")
    if not learned and objective.loss is LossKind.HYBRID:
        raise UserError(
            f"{field}.loss: hybrid trains a learned variance, and process.variance is {process.variance}: set it to "
            "learned_range, or use simple."
        )
    if not process.schedule.is_discrete and objective.loss is LossKind.VLB:
        raise UserError(
            f"{field}.loss: vlb is for the schedules with timesteps, and process.schedule is "
            f"{process.schedule}: use simple."
        )
    if not process.schedule.is_discrete and objective.times is TimeDraw.IMPORTANCE:
        raise UserError(
            f"{field}.times: importance is for the schedules with timesteps, and process.schedule is "
            f"{process.schedule}: use schedule."
        )
    if len(objective.importance) > process.timesteps:
        raise UserError(
            f"{field}.importance: {len(objective.importance)} numbers are more than the {process.timesteps} timesteps."
        )
    if objective.times is TimeDraw.LOGIT_NORMAL and process.schedule is not ScheduleKind.FLOW:
        raise UserError(
            f"{field}.times: logit_normal is for the schedule flow, and process.schedule is {process.schedule}: use "
            "schedule."
        )
    _check_time_options(field, objective, process)


def _check_time_options(field: str, objective: ObjectiveConfig, process: ProcessConfig) -> None:
    taken = process.schedule is ScheduleKind.EDM or objective.times is TimeDraw.LOGIT_NORMAL
    for name in ("time_mean", "time_std"):
        if getattr(objective, name) is not None and not taken:
            raise UserError(
                f"{field}.{name}: {getattr(objective, name)} is not accepted, as only the schedule edm and the times "
                "logit_normal take it: leave it out."
            )


def timestep_probabilities(importance: tuple[float, ...], timesteps: int) -> list[float]:
    """How likely each of T timesteps is by a table of equal ranges; they add up to 1.

    A timestep that lies in two ranges takes a part of each.
    """
    probabilities, total = [0.0] * timesteps, math.fsum(importance)
    for t, i, share in range_shares(len(importance), timesteps):
        probabilities[t] += importance[i] * share / total
    return probabilities


def range_shares(ranges: int, timesteps: int) -> Iterator[tuple[int, int, float]]:
    """Timestep t, range i, and the share of range i that timestep t takes: those of a range add up to 1."""
    for t in range(timesteps):
        low, high = t * ranges / timesteps, (t + 1) * ranges / timesteps
        for i in range(int(low), min(math.ceil(high), ranges)):
            yield t, i, min(high, i + 1.0) - max(low, float(i))
