"""The options that several verbs of the command share.

Numbers are taken as text: the configuration checks them, and says which field does not accept which value.
"""

from __future__ import annotations

from typing import Annotated

import typer

Preset = Annotated[
    str | None,
    typer.Option("--preset", "-p", help="Start from a preset: digits, fashion-mnist, cifar10, digits-flow, …"),
]
ConfigFile = Annotated[str | None, typer.Option("--config", "-c", help="Start from a YAML file.", metavar="FILE")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Override any field, as training.batch_size=256.", metavar="FIELD=VALUE"),
]
Store = Annotated[
    str | None,
    typer.Option("--store", envvar="DIFFUSION_STORE", help="Root of the store: a folder or s3://bucket/prefix."),
]
Name = Annotated[str | None, typer.Option("--name", help="Name of the dataset, the experiment and the model.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

Source = Annotated[
    str | None, typer.Option("--source", help="Where the images are: folder, file or s3:// URI, or digits.")
]
ImageSize = Annotated[
    str | None, typer.Option("--image-size", help="Size in pixels, as 32, or height and width, as 32x48.")
]
Dataset = Annotated[
    str | None, typer.Option("--dataset", help="Dataset: name (its newest version), name@version, or URI.")
]
Images = Annotated[str | None, typer.Option("--images", metavar="N", help="Train until this many images were seen.")]
TimeBudget = Annotated[str | None, typer.Option("--time-budget", help="Stop training after this time, as 20m or 1200.")]
BatchSize = Annotated[str | None, typer.Option("--batch-size", metavar="N", help="Images of one optimizer step.")]
InitFrom = Annotated[
    str | None, typer.Option("--init-from", help="Model to start training from: name@alias, run or bundle.")
]
Workers = Annotated[str | None, typer.Option("--workers", metavar="N", help="Workers of each stage.")]
Samples = Annotated[str | None, typer.Option("--samples", metavar="N", help="Images that the evaluation generates.")]
Count = Annotated[str | None, typer.Option("--count", metavar="N", help="Images to generate.")]
FirstImageId = Annotated[
    str | None,
    typer.Option(
        "--first-image-id", metavar="N", help="First image id; default: the configuration's, else the next free one."
    ),
]
Labels = Annotated[
    str | None, typer.Option("--labels", help="balanced, classes as 3,5 or cat,dog, or a file of labels.")
]
Sampler = Annotated[str | None, typer.Option("--sampler", help="Sampler of the generation, as ddim or dpmpp_2m.")]
Steps = Annotated[str | None, typer.Option("--steps", metavar="N", help="Sampler steps of the generation.")]
Guidance = Annotated[
    str | None, typer.Option("--guidance", metavar="N", help="Guidance scale of the generation; 1 is neutral.")
]
Contestants = Annotated[
    list[str] | None,
    typer.Option("--sampler", help="A sampler to compare, as dpmpp_2m:10; again for each.", metavar="KIND:STEPS"),
]
Reference = Annotated[
    str | None, typer.Option("--reference", help="The one that the others are measured against, as ddpm:250.")
]
Candidate = Annotated[
    str | None, typer.Option("--candidate", help="The one that is to be as good as the reference, as dpmpp_2m:10.")
]
Seeds = Annotated[str | None, typer.Option("--seeds", metavar="N", help="Sets of images of each sampler.")]
SeedImages = Annotated[str | None, typer.Option("--images", metavar="N", help="Images of each set.")]
CommonGuidance = Annotated[
    str | None, typer.Option("--guidance", metavar="N", help="Guidance scale of all samplers; 1 is neutral.")
]
Format = Annotated[str | None, typer.Option("--format", help="parquet, webdataset or png.")]
Seed = Annotated[str | None, typer.Option("--seed", metavar="N", help="Seed of the generation.")]
Backend = Annotated[str | None, typer.Option("--backend", help="local, or jobs (the Ray Jobs API).")]
