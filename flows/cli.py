"""The `diffusion` command. Nothing heavy is imported before a verb needs it: `--help` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows import cli_automation, cli_setup, cli_store
from flows import options as o

if TYPE_CHECKING:
    from flows.config import PipelineConfig

EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130

app = typer.Typer(
    help="Train diffusion models on your own images and generate image sets in bulk.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _without_a_verb(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Exit status: 0, 1 if the work failed, 2 for a mistake of the user, told in one sentence."""
    try:
        status = int(app(args=arguments, standalone_mode=False) or 0)
    except Exception as error:
        return _told(error)
    if status == EXIT_INTERRUPTED:  # what typer makes of a Ctrl-C
        print("Interrupted; the same command continues the work.", file=sys.stderr)
    return status


def _told(error: Exception) -> int:
    from diffusion_core.config import UserError
    from diffusion_core.jobs.backend import JobFailed
    from diffusion_core.patience import StoreUnavailable

    if isinstance(error, UserError | JobFailed | StoreUnavailable):
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILED
    if callable(
        say := getattr(error, "format_message", None)
    ):  # an option that does not exist, a value that is missing
        print(f"{' '.join(say().split()).rstrip('.')}; see diffusion --help.", file=sys.stderr)
        return EXIT_USER_ERROR
    raise error


@app.command()
def demo(store: o.Store = None, settings: o.Settings = None, as_json: o.Json = False) -> None:
    """Run the whole pipeline on real handwritten digits, in minutes."""
    config = _config("digits", None, settings, store=store)
    _pipeline(config, {"preset": "digits", "set": settings}, as_json)


@app.command()
def pipeline(
    preset: o.Preset = None,
    config_file: o.ConfigFile = None,
    settings: o.Settings = None,
    store: o.Store = None,
    name: o.Name = None,
    source: o.Source = None,
    image_size: o.ImageSize = None,
    images: o.Images = None,
    time_budget: o.TimeBudget = None,
    batch_size: o.BatchSize = None,
    init_from: o.InitFrom = None,
    samples: o.Samples = None,
    count: o.Count = None,
    first_image_id: o.FirstImageId = None,
    workers: o.Workers = None,
    backend: o.Backend = None,
    as_json: o.Json = False,
) -> None:
    """Images to dataset version to trained, evaluated and registered model to generated images."""
    given = {
        key: value for key, value in locals().items() if key not in ("preset", "config_file", "settings", "as_json")
    }
    config = _config(preset, config_file, settings, **given)
    _pipeline(config, {**given, "preset": preset, "config": config_file, "set": settings}, as_json)


@app.command()
def shard(
    preset: o.Preset = None,
    config_file: o.ConfigFile = None,
    settings: o.Settings = None,
    store: o.Store = None,
    name: o.Name = None,
    source: o.Source = None,
    image_size: o.ImageSize = None,
    workers: o.Workers = None,
    backend: o.Backend = None,
    as_json: o.Json = False,
) -> None:
    """Turn a source of images into a dataset version."""
    config = _config(
        preset, config_file, settings,
        store=store, name=name, source=source, image_size=image_size, workers=workers, backend=backend,
    )  # fmt: skip
    from flows import preflight
    from flows.results import shard_rows
    from flows.runner import run_flow

    request = config.shard_request()
    preflight.check_shard(request, config.backend)
    _show(run_flow("shard_dataset", request, config.backend), shard_rows, as_json)


@app.command()
def train(
    preset: o.Preset = None,
    config_file: o.ConfigFile = None,
    settings: o.Settings = None,
    store: o.Store = None,
    name: o.Name = None,
    dataset: o.Dataset = None,
    images: o.Images = None,
    time_budget: o.TimeBudget = None,
    batch_size: o.BatchSize = None,
    init_from: o.InitFrom = None,
    workers: o.Workers = None,
    backend: o.Backend = None,
    as_json: o.Json = False,
) -> None:
    """Train a model on a dataset version, or continue its run."""
    config = _config(
        preset, config_file, settings, source_needed=False,
        store=store, name=name, images=images, time_budget=time_budget, batch_size=batch_size, init_from=init_from,
        workers=workers, backend=backend,
    )  # fmt: skip
    from diffusion_core.jobs.requests import TrainRequest
    from flows import find, preflight
    from flows.results import train_rows
    from flows.runner import run_flow

    dataset_uri = find.dataset(dataset or config.dataset.name, config.store, "--dataset")
    request = TrainRequest(
        store=config.store,
        resources=config.resources.train,
        dataset_uri=dataset_uri,
        process=config.process,
        network=config.network,
        training=config.training,
        experiment=config.name,
    )
    preflight.check_train(request, config.backend)
    _show(run_flow("train_model", request, config.backend), train_rows, as_json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Option("--model", help="Bundle, run, or models:/name@alias to measure.")],
    preset: o.Preset = None,
    config_file: o.ConfigFile = None,
    settings: o.Settings = None,
    store: o.Store = None,
    dataset: o.Dataset = None,
    samples: o.Samples = None,
    workers: o.Workers = None,
    backend: o.Backend = None,
    as_json: o.Json = False,
) -> None:
    """Measure a model against a dataset version (default: the one that it was trained on)."""
    config = _config(
        preset, config_file, settings, source_needed=False,
        store=store, samples=samples, workers=workers, backend=backend,
    )  # fmt: skip
    from diffusion_core.jobs.requests import EvaluateRequest
    from flows import find, preflight
    from flows.results import evaluate_rows
    from flows.runner import run_flow

    bundle = find.bundle(model, config.store)
    request = EvaluateRequest(
        store=config.store,
        resources=config.resources.evaluate,
        bundle_uri=bundle.uri,
        dataset_uri=find.dataset(dataset or bundle.config.dataset.uri, config.store, "--dataset"),
        evaluation=config.evaluation,
        mlflow_run_id=bundle.config.mlflow_run_id,
    )
    preflight.check_evaluate(request, config.backend)
    _show(run_flow("evaluate_model", request, config.backend), evaluate_rows, as_json)


@app.command()
def compare_samplers(
    model: Annotated[str, typer.Option("--model", help="Bundle, run, or models:/name@alias whose samplers compete.")],
    preset: o.Preset = None,
    config_file: o.ConfigFile = None,
    settings: o.Settings = None,
    store: o.Store = None,
    dataset: o.Dataset = None,
    sampler: o.Contestants = None,
    reference: o.Reference = None,
    candidate: o.Candidate = None,
    seeds: o.Seeds = None,
    images: o.SeedImages = None,
    guidance: o.CommonGuidance = None,
    workers: o.Workers = None,
    backend: o.Backend = None,
    as_json: o.Json = False,
) -> None:
    """Make a table and a plot of sample quality against network evaluations, sampler by sampler."""
    config = _config(
        preset, config_file, settings, source_needed=False,
        store=store, contestants=sampler or None, reference=reference, candidate=candidate, seeds=seeds,
        compared_images=images, compared_guidance=guidance, workers=workers, backend=backend,
    )  # fmt: skip
    from diffusion_core.jobs.requests import CompareRequest
    from flows import find, preflight
    from flows.results import comparison_rows, comparison_text
    from flows.runner import run_flow

    bundle = find.bundle(model, config.store)
    request = CompareRequest(
        store=config.store,
        resources=config.resources.evaluate,
        bundle_uri=bundle.uri,
        dataset_uri=find.dataset(dataset or bundle.config.dataset.uri, config.store, "--dataset"),
        evaluation=config.evaluation,
        comparison=config.comparison,
    )
    preflight.check_compare(request, config.backend)
    result = run_flow("compare_samplers", request, config.backend)
    if not as_json:
        typer.echo(f"{comparison_text(result)}\n")
    _show(result, comparison_rows, as_json)


@app.command()
def register(
    model: Annotated[str, typer.Option("--model", help="Bundle or run to register.")],
    preset: o.Preset = None,
    config_file: o.ConfigFile = None,
    settings: o.Settings = None,
    store: o.Store = None,
    name: o.Name = None,
    dataset: o.Dataset = None,
    backend: o.Backend = None,
    as_json: o.Json = False,
) -> None:
    """Register a bundle as a model version; it becomes the champion if it passes the gate."""
    config = _config(preset, config_file, settings, source_needed=False, store=store, name=name, backend=backend)
    from flows import find
    from flows.results import register_rows
    from flows.runner import run_alone

    bundle = find.bundle(model, config.store)
    request = find.register_request(config, bundle, name or preset, dataset)
    _show(run_alone("register", request, config.backend), register_rows, as_json)


@app.command()
def generate(
    model: Annotated[
        str | None, typer.Option("--model", help="models:/name@alias, models:/name/version, or a bundle.")
    ] = None,
    preset: o.Preset = None,
    config_file: o.ConfigFile = None,
    settings: o.Settings = None,
    store: o.Store = None,
    name: o.Name = None,
    count: o.Count = None,
    first_image_id: o.FirstImageId = None,
    labels: o.Labels = None,
    sampler: o.Sampler = None,
    steps: o.Steps = None,
    guidance: o.Guidance = None,
    seed: o.Seed = None,
    image_format: o.Format = None,
    workers: o.Workers = None,
    backend: o.Backend = None,
    as_json: o.Json = False,
) -> None:
    """Generate images with a model (default: the champion), or complete and extend their set."""
    config = _config(
        preset, config_file, settings, source_needed=False,
        store=store, name=name, count=count, first_image_id=first_image_id, labels=labels, sampler=sampler,
        steps=steps, guidance=guidance, seed=seed, format=image_format, workers=workers, backend=backend,
    )  # fmt: skip
    from diffusion_core.config import UserError
    from diffusion_core.jobs.requests import GenerateRequest
    from flows import find, preflight
    from flows.results import generate_rows
    from flows.runner import run_flow

    if model is None and not (preset or config_file or name):
        raise UserError("--model: a model is needed, as models:/digits@champion, or --name of a registered model.")
    reference = find.model_reference(model or f"models:/{config.name}@champion", config.store)
    request = GenerateRequest(
        store=config.store, resources=config.resources.generate, model=reference, generation=config.generation
    )
    preflight.check_generate(request, config.backend)
    _show(run_flow("generate_images", request, config.backend), generate_rows, as_json)


def _config(
    preset: str | None, file: str | None, settings: list[str] | None, source_needed: bool = True, **given: Any
) -> PipelineConfig:
    from flows.shortcuts import load

    return load(preset, file, settings or (), source_needed, given)


def _pipeline(config: PipelineConfig, typed: Mapping[str, Any], as_json: bool) -> None:
    from flows import preflight, results
    from flows.runner import run_flow

    preflight.check_pipeline(config)
    result = run_flow("diffusion_pipeline", config)
    _show(result, results.pipeline_rows, as_json)
    if not as_json:
        typer.echo("\nnext:")
        for command in results.next_commands(result, typed):
            typer.echo(f"  {command}")


def _show(result: Any, rows: Any, as_json: bool) -> None:
    from flows import results

    if as_json:
        cli_store.print_json(results.as_json(result))
    else:
        typer.echo(results.aligned(rows(result)))


cli_store.add_to(app)
cli_setup.add_to(app)
cli_automation.add_to(app)

if __name__ == "__main__":
    sys.exit(main())
