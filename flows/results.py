"""What a pipeline answers, and how results are told: as rows of a table, for terminals and for Prefect alike."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from diffusion_core.config import Config
from diffusion_core.evaluation.comparison import table
from diffusion_core.jobs.requests import (
    CompareResult,
    EvaluateResult,
    GenerateResult,
    RegisterResult,
    Result,
    ShardResult,
    TrainResult,
)

Rows = list[tuple[str, str]]


class PipelineResult(Config):
    """The results of all stages."""

    name: str
    store: str
    dataset: ShardResult
    run: TrainResult
    evaluation: EvaluateResult
    version: RegisterResult
    images: GenerateResult
    news: str = Field("", description="One sentence: what was done, or since when nothing has changed.")

    @property
    def stages(self) -> dict[str, Result]:
        """Result by stage, in order."""
        return {
            "shard": self.dataset,
            "train": self.run,
            "evaluate": self.evaluation,
            "register": self.version,
            "generate": self.images,
        }


def pipeline_rows(result: PipelineResult) -> Rows:
    """The table at the end of a pipeline."""
    dataset, run, version, images = result.dataset, result.run, result.version, result.images
    return [
        ("dataset version", f"{dataset.uri}  {_splits(dataset)}, {dataset.rejected} rejected"),
        ("run", f"{run.run_id}  {run.images_seen:,} images seen"),
        ("loss", f"{run.loss:.5f}"),
        *[("evaluation" if number == 0 else "", text) for number, text in enumerate(figure_lines(result.evaluation))],
        (
            "model version",
            f"models:/{version.model}/{version.version}  {'champion' if version.promoted else 'candidate'}",
        ),
        ("", version.reason),
        ("image set", f"{images.uri}  {images.images:,} images, {images.generated:,} new"),
        ("contact sheet", images.contact_sheet),
        ("news", result.news),
        ("seconds", ", ".join(f"{name} {_seconds(stage)}" for name, stage in result.stages.items())),
    ]


def next_commands(result: PipelineResult, typed: Mapping[str, Any]) -> list[str]:
    """The three commands worth typing after a pipeline; the training continues its run.

    Args:
        result: what the pipeline answered.
        typed: the options it was given, by name, with None for one that was not, and a list for `set`.
    """
    chosen = {name: typed.get(name) for name in ("preset", "config", "name", "set", "workers", "backend")}
    start = {name: typed.get(name) for name in ("batch_size", "init_from")}
    store, dataset = result.store, result.dataset.uri
    model = f"models:/{result.version.model}/{result.version.version}"
    longer = 2 * result.run.images_seen
    return [
        _command("lineage", result.images.uri, store=store),
        _command("generate", **chosen, store=store, model=model, count=10_000),
        _command("train", **chosen, **start, store=store, dataset=dataset, images=longer, time_budget="20m"),
    ]


def _command(verb: str, *arguments: str, **options: Any) -> str:
    """A line for the shell; options that are None are left out, and lists give one option an entry."""
    words = ["diffusion", verb, *arguments]
    for name, value in options.items():
        for entry in value if isinstance(value, list) else [value]:
            if entry is not None:
                words += [f"--{name.replace('_', '-')}", str(entry)]
    return shlex.join(words)


def shard_rows(result: ShardResult) -> Rows:
    return [
        ("dataset version", result.version),
        ("place", result.uri),
        ("rows", _splits(result)),
        ("rejected", f"{result.rejected} (rejected.parquet says why)" if result.rejected else "none"),
        ("shards", str(result.shards)),
        ("seconds", _seconds(result)),
    ]


def train_rows(result: TrainResult) -> Rows:
    return [
        ("run", result.run_id),
        ("place", result.run_uri),
        ("bundle", result.bundle_uri),
        ("images seen", f"{result.images_seen:,}"),
        ("loss", f"{result.loss:.5f}"),
        ("images per second", f"{result.images_per_second:,.0f}"),
        ("MLflow run", result.mlflow_run_id),
        ("seconds", _seconds(result)),
    ]


def evaluate_rows(result: EvaluateResult) -> Rows:
    lines = figure_lines(result)
    return [
        ("evaluation", lines[0]),
        *[("", line) for line in lines[1:]],
        ("report", result.uri),
        ("seconds", _seconds(result)),
    ]


def comparison_text(result: CompareResult) -> str:
    """The table of a comparison of samplers, and the candidate's verdict below it."""
    found = result.comparison
    said = f"\n\n{found.verdict.sentence}" if found.verdict else ""
    return f"{table(found)}{said}"


def comparison_rows(result: CompareResult) -> Rows:
    found = result.comparison
    return [
        ("samples", f"{found.images:,} images for each of {len(found.seeds)} seeds; means ± standard errors"),
        ("cells", f"{result.cells:,}, {result.made:,} new"),
        ("table", result.table),
        ("plot", result.picture),
        ("report", result.uri),
        ("seconds", _seconds(result)),
    ]


def register_rows(result: RegisterResult) -> Rows:
    return [
        ("model version", f"models:/{result.model}/{result.version}"),
        ("alias", "champion" if result.promoted else "candidate"),
        ("gate", result.reason),
        ("seconds", _seconds(result)),
    ]


def generate_rows(result: GenerateResult) -> Rows:
    last = result.first_image_id + result.images - 1
    return [
        ("image set", result.set_id),
        ("place", result.uri),
        ("model version", result.model_version),
        (
            "image ids",
            f"{result.first_image_id:,} to {last:,}: {result.images:,} images, {result.generated:,} of them new",
        ),
        ("in the set", f"{result.total_images:,} images"),
        ("images per second", f"{result.images_per_second:,.1f}"),
        ("contact sheet", result.contact_sheet),
        ("seconds", _seconds(result)),
    ]


def figure_lines(result: EvaluateResult) -> list[str]:
    """`kernel_distance -4.4 ± 5.0 (held-out real images: -4.1 ± 4.6)`, one a figure."""
    lines = []
    for name in result.figures:
        if not name.endswith("_error"):  # of the figure before it, and shown with it
            floor = f" (held-out real images: {_amount(result.floor, name)})" if name in result.floor else ""
            lines.append(f"{name} {_amount(result.figures, name)}{floor}")
    return lines or ["no figures"]


def _amount(figures: Mapping[str, float], name: str) -> str:
    """A figure, with its standard error if it has one, which then decides how many digits mean anything."""
    value, error = figures[name], figures.get(f"{name}_error")
    if not error:
        return f"{value:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def figure_table(result: EvaluateResult) -> list[dict[str, Any]]:
    """The figures with their floor, as rows of a Prefect table."""
    return [
        {"figure": name, "generated": value, "held-out real images (floor)": result.floor.get(name)}
        for name, value in result.figures.items()
    ]


def aligned(rows: Rows) -> str:
    """Rows as text in two columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


def markdown(rows: Rows, title: str) -> str:
    """Rows as a Markdown table."""
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines])


def as_json(result: Config) -> Mapping[str, Any]:
    return result.model_dump(mode="json")


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")


def _splits(result: ShardResult) -> str:
    return ", ".join(f"{rows:,} {split}" for split, rows in result.splits.items())


def _seconds(result: Result) -> str:
    return f"{result.seconds:.0f}" + (" (found done)" if result.reused else "")
