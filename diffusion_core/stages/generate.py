"""Model version → image set, which every later request of the same kind completes or extends."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, model_validator
from pydantic.json_schema import SkipJsonSchema

from diffusion_core.config import UserError, execution
from diffusion_core.generation.config import GenerationConfig
from diffusion_core.jobs.request import Request, Result
from diffusion_core.stages import options as o
from diffusion_core.stages.base import Rows, ShortForm, Stage, seconds
from diffusion_core.stages.events import Event

if TYPE_CHECKING:
    from diffusion_core.jobs.backend import BackendConfig
    from diffusion_core.stages.config import PipelineConfig


class GenerateRequest(Request):
    model: str = Field(description="Model: name@alias, name/version, a run, or the URI of a bundle.")
    generation: GenerationConfig = GenerationConfig()
    bundle_uri: SkipJsonSchema[str | None] = execution(
        None, description="The bundle of that version, where it is known: the registry is not asked for it then."
    )
    asked: SkipJsonSchema[str | None] = execution(
        None,
        pattern=r"^[A-Za-z0-9._-]{1,100}$",
        description="Who asks for new images, as the id of a scheduled run: the first request of each id makes new "
        "ones, and every later one is about the same images of the same model version.",
    )

    @classmethod
    def of(cls, config: PipelineConfig, model: str, bundle_uri: str | None = None) -> GenerateRequest:
        return cls(
            store=config.store,
            resources=config.resources.generate,
            model=model,
            generation=config.generation,
            bundle_uri=bundle_uri,
        )

    def for_new_images(self, asked: str) -> GenerateRequest:
        """The request for new images, whatever ids the configuration names."""
        generation = self.generation.model_copy(update={"first_image_id": None})
        return self.model_copy(update={"generation": generation, "asked": asked})

    @model_validator(mode="after")
    def _new_or_named(self) -> GenerateRequest:
        if self.asked is not None and self.generation.first_image_id is not None:
            raise ValueError("asked means new images, and generation.first_image_id names some: leave one of them out")
        return self


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


Format = Annotated[
    str | None,
    Field(title="Format", description="How images are stored: parquet, webdataset or png."),
    o.Typed("generation.format"),
]


class GenerateOptions(o.Options):
    model: Annotated[
        str | None, Field(title="Model", description="Model: name@alias, name/version, run or bundle.")
    ] = None
    name: o.Name = None
    count: o.Count = None
    first_image_id: o.FirstImageId = None
    labels: o.Labels = None
    sampler: Annotated[
        str | None,
        Field(title="Sampler", description="Sampler of the generation, as ddim or dpmpp_2m."),
        o.Typed("generation.sampler.kind"),
    ] = None
    steps: Annotated[
        int | None,
        Field(title="Sampler steps", description="Sampler steps of the generation."),
        o.Typed("generation.sampler.steps", metavar="N"),
    ] = None
    guidance: Annotated[
        float | None,
        Field(title="Guidance scale", description="Guidance scale of the generation; 1 is neutral."),
        o.Typed("generation.guidance.scale", metavar="N"),
    ] = None
    seed: Annotated[
        int | None,
        Field(title="Seed", description="Seed of the generation."),
        o.Typed("generation.seed", metavar="N"),
    ] = None
    format: Format = None
    workers: o.Workers = None
    gpus_per_worker: o.Gpus = None

    def request(self, config: PipelineConfig) -> GenerateRequest:
        from diffusion_core.catalog import find

        if self.model is None and not (self.preset or self.config or self.name):
            raise UserError("--model: a model is needed, as digits@champion, or --name of a registered model.")
        model = self.model or f"models:/{config.name}@champion"
        return GenerateRequest.of(config, find.model_reference(model, config.store))


class ChampionOptions(o.Options):
    unread: ClassVar[tuple[str, ...]] = (*o.CONFIGURATION, "backend")

    model: Annotated[str, Field(title="Model", description="Registered model, as digits; its champion is used.")]
    count: o.Count = None
    labels: o.Labels = None
    format: Format = None

    def request(self, config: PipelineConfig) -> GenerateRequest:
        """Of the champion, which is looked for here: the sentence about a model that has none names the input."""
        from diffusion_core.tracking import check_alias

        reference = f"models:/{self.model}@champion"
        if re.search("[:/@]", self.model):
            raise UserError(f"--model {self.model}: give the name of a registered model, as digits.")
        try:
            check_alias(reference, config.store)
        except UserError as error:
            raise UserError(f"--model {self.model}: {error}") from None
        return GenerateRequest.of(config, reference)


def check(request: GenerateRequest, backend: BackendConfig) -> None:
    """The model makes images, and sampler, guidance and labels suit it."""
    from diffusion_core.bundle import check_makes_images, read_bundle_config
    from diffusion_core.catalog import find
    from diffusion_core.diffusion.config import check_sampler
    from diffusion_core.stages import checks

    checks.check_place(request, "generate", backend, mlflow=find.registered(request.model) is not None)
    bundle = read_bundle_config(checks.bundle_of(request.model, request.store))
    check_makes_images(request.model, bundle)
    check_sampler("generation.sampler", request.generation.sampler, bundle.process)
    guidance, shape, classes = request.generation.guidance, bundle.image_shape, bundle.class_names
    checks.check_guidance("generation.guidance", guidance, bundle.process, shape, classes, request.store)
    checks.check_labels(request.generation, classes)


def run(request: GenerateRequest) -> GenerateResult:
    """Resolve the model, make what is missing, and say what is there. Raises what `work.generate.generate` raises."""
    from diffusion_core.stages.work.generate import generate
    from diffusion_core.store import layout

    began = time.monotonic()
    if request.bundle_uri:
        bundle_uri, version = request.bundle_uri, request.model.removeprefix("models:/")
    else:
        bundle_uri, version = _resolve(_settled(request), request.store)
    done = generate(
        bundle_uri,
        request.generation,
        request.store,
        request.resources,
        model_version=version,
        asked=request.asked,
    )
    return GenerateResult(
        seconds=time.monotonic() - began,
        reused=done.generated == 0,
        set_id=done.images.description.set_id,
        uri=done.images.uri,
        model_version=version,
        images=done.stored,
        generated=done.generated,
        first_image_id=done.first_image_id,
        contact_sheet=f"{done.images.uri}/{layout.SHEET}",
        total_images=done.images.total_images(),
        images_per_second=done.images_per_second,
    )


def _settled(request: GenerateRequest) -> str:
    """The model that is meant. Who asks keeps the version that an alias named when it first asked."""
    from diffusion_core.store import Directory, layout

    if request.asked is None or "@" not in request.model:
        return request.model
    store, key = Directory(request.store), layout.asked(request.asked)
    if not store.exists(key):
        _, version = _resolve(request.model, request.store)
        store.create_json(key, {"schema_version": 1, "model": f"models:/{version}"})
    return str(store.read_json(key)["model"])


def _resolve(model: str, store: str) -> tuple[str, str]:
    """URI of the bundle that a reference means, and the version by which to call it."""
    from diffusion_core.catalog import find

    resolved = find.model(model, store)
    return resolved.bundle_uri, resolved.version if resolved.name else resolved.digest


def rows(result: GenerateResult) -> Rows:
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
        ("seconds", seconds(result)),
    ]


def events(request: GenerateRequest, result: GenerateResult) -> list[Event]:
    last = result.first_image_id + result.images - 1
    payload = result.model_dump(exclude={"reused", "generated"}) | {"last_image_id": last}
    return [Event("diffusion.images.completed", result.set_id, payload, once=f"{result.first_image_id}-{last}")]


STAGE = Stage(
    name="generate",
    flow="generate-images",
    title="Image set",
    options=GenerateOptions,
    request=GenerateRequest,
    result=GenerateResult,
    check=check,
    run=run,
    rows=rows,
    events=events,
    picture=lambda result: result.contact_sheet,
    mlflow=lambda result: None if result.model_version.startswith("bundle/") else f"models:/{result.model_version}",
    short_forms=(
        ShortForm(
            "generate-from-champion",
            "New images of a registered model's champion.",
            ChampionOptions,
        ),
    ),
)
