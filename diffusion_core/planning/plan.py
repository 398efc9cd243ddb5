"""The plan of a pipeline, where it is kept, and how it compares with what the pipeline took.

It is kept in `<store>/plans/<digest of the configuration>.json` by `diffusion plan` and by nothing else: a pipeline
never waits for a trial, and one that was planned is compared with its plan.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field, ValidationError

from diffusion_core.config import Config, digest
from diffusion_core.planning.crew import Say, Trial, measure
from diffusion_core.planning.estimate import StagePlan, estimate
from diffusion_core.planning.outlook import look
from diffusion_core.stages.config import PipelineConfig
from diffusion_core.store import Directory, layout

_BATCHES = {
    "train": "training.microbatch_size",
    "evaluate": "evaluation.batch_size",
    "generate": "generation.batch_size",
}  # what the memory of a stage's worker grows with


class Plan(Config):
    """What a pipeline would do and take, by stage."""

    schema_version: int = 1
    name: str
    store: str
    stages: list[StagePlan]
    seconds: float = Field(description="Wall-clock seconds of all jobs, one after the other.")
    gpu_hours: float
    bytes: int = Field(description="Bytes that the store would grow by.")
    memory: str = Field(description="Whether it fits the memory of this machine and of its GPU, in words.")
    fits: bool
    trial: Trial = Field(description="What was measured, by part.")


def make(config: PipelineConfig, say: Say = lambda text: None) -> Plan:
    """Look at what is there, try what is not, and keep the plan in the store.

    Raises:
        UserError: the source cannot be read, or a part of the work cannot be tried.
    """
    outlook = look(config)
    trial = measure(config, outlook, say)
    stages = estimate(config, outlook, trial)
    fits, sentence = judge_memory(stages, main_memory(), gpu_memory())
    plan = Plan(
        name=config.name,
        store=config.store,
        stages=stages,
        seconds=sum(stage.seconds for stage in stages),
        gpu_hours=sum(stage.gpu_hours for stage in stages),
        bytes=sum(stage.bytes for stage in stages),
        memory=sentence,
        fits=fits,
        trial=trial,
    )
    Directory(config.store).write(layout.plan(_id(config)), plan.model_dump_json(indent=2).encode())
    return plan


def kept(config: PipelineConfig) -> Plan | None:
    """The last plan of this very configuration; None if there is none."""
    try:
        return Plan.model_validate_json(Directory(config.store).read(layout.plan(_id(config))))
    except (FileNotFoundError, ValidationError):
        return None


def _id(config: PipelineConfig) -> str:
    return digest(config.model_dump(mode="json", exclude={"store", "backend", "comparison"}))


def judge_memory(stages: list[StagePlan], main: int, gpu: int) -> tuple[bool, str]:
    """Whether the hungriest stages fit, and a sentence about each. main, gpu: bytes that there are; 0: no GPU."""
    most = max(stages, key=lambda stage: stage.memory_bytes)
    if not most.memory_bytes:
        return True, "Nothing has to be computed."
    fits = most.memory_bytes <= main
    verdict = "it fits" if fits else f"it does not fit, ask for fewer workers{_or_smaller(most)}"
    sentence = f"The most memory at once takes {most.stage}, {_gb(most.memory_bytes)} of {_gb(main)}: {verdict}."
    hungry = max(stages, key=lambda stage: stage.gpu_memory_bytes)
    if gpu and hungry.gpu_memory_bytes:
        fits_gpu = hungry.gpu_memory_bytes <= gpu
        fits = fits and fits_gpu
        verdict = "it fits" if fits_gpu else f"it does not fit, ask for a smaller {_BATCHES[hungry.stage]}"
        sentence += (
            f" Of a GPU's {_gb(gpu)} a worker of {hungry.stage} takes {_gb(hungry.gpu_memory_bytes)}: {verdict}."
        )
    return fits, sentence


def _or_smaller(stage: StagePlan) -> str:
    return f" or a smaller {_BATCHES[stage.stage]}" if stage.stage in _BATCHES else ""


def main_memory() -> int:
    """Bytes of main memory of this machine, or of the container that limits it."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return there if text == "max" else min(there, int(text))


def gpu_memory() -> int:
    """Bytes of the first GPU; 0 without one."""
    import torch

    return int(torch.cuda.mem_get_info()[1]) if torch.cuda.is_available() else 0


def table(plan: Plan) -> list[dict[str, str]]:
    """A row a stage and one for all, in words and units for people."""
    rows = [
        {
            "stage": stage.stage,
            "state": stage.state.value,
            "images": f"{stage.images:,}" if stage.images else "",
            "steps": f"{stage.steps:,}" if stage.steps else "",
            "stored": _mb(stage.bytes),
            "time": _time(stage.seconds),
            "GPU hours": f"{stage.gpu_hours:.2f}",
        }
        for stage in plan.stages
    ]
    total = {"stage": "all", "state": "", "images": "", "steps": "", "stored": _mb(plan.bytes)}
    return [*rows, {**total, "time": _time(plan.seconds), "GPU hours": f"{plan.gpu_hours:.2f}"}]


def predicted(config: PipelineConfig) -> dict[str, float] | None:
    """Seconds by stage of the last plan of a configuration; None if it was never planned."""
    plan = kept(config)
    return None if plan is None else {stage.stage: stage.seconds for stage in plan.stages}


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count else ""


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
