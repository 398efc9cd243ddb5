"""Configuration of the evaluation and of the gate. Light: no torch, so that requests and the command start fast."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from diffusion_core.config import Config, UserError, digest, execution, later
from diffusion_core.diffusion.config import GuidanceConfig, ProcessConfig, SamplerConfig
from diffusion_core.diffusion.kinds import Choice, SamplerKind, ScheduleKind, Spacing, Variance


class Extractor(StrEnum):
    """Which network turns images into the features that the distances compare."""

    classifier = "classifier"
    """A small CNN that the evaluation trains on the dataset version itself and caches with it."""
    inception = "inception"
    """InceptionV3 from a weights file that the user names. Only then a Fréchet distance is called FID."""


class EvaluationLabels(StrEnum):
    """Which labels the evaluated samples are asked to show."""

    dataset = "dataset"
    """The labels of the held-out images that make the floor, one for one: both sets have the same class mix."""
    balanced = "balanced"
    """Every class equally often."""


class ClassifierConfig(Config):
    """How the feature extractor of a dataset is trained. On the CPU, with fixed seed and threads: reproducible.

    A labelled dataset gets a classifier of its classes. One without labels gets a classifier of rotations by 0, 90, 180
    and 270 degrees (Gidaris et al., 2018, "Unsupervised Representation Learning by Predicting Image Rotations").
    """

    width: int = Field(
        16, ge=8, le=256, multiple_of=8, description="Channels of the first stage; doubled in the second."
    )
    features: int = Field(64, ge=8, le=2048, description="Length of the feature vector that the distances compare.")
    images: int = Field(60_000, ge=1, description="Training images seen, repeated over epochs when there are fewer.")
    batch_size: int = Field(128, ge=2, le=8192, description="Training images a step.")
    learning_rate: float = Field(
        2e-3, gt=0, le=1, description="Peak of the learning rate: warm-up, then cosine to zero."
    )
    weight_decay: float = Field(1e-2, ge=0, le=10, description="Decoupled weight decay (AdamW).")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the initial weights and the order of images.")
    threads: int = Field(
        1, ge=1, le=256, description="CPU threads of training, of extraction, and of figures of held-out images."
    )


class LikelihoodMethod(Choice):
    """How the likelihood of held-out images is measured."""

    BOUND = "bound", "the variational bound, one evaluation of the network a step; tight with all timesteps only"
    EXACT = "exact", "exactly, by the probability-flow ODE: four evaluations with their gradient a step"


class LikelihoodConfig(Config):
    """Bits per dimension of held-out images."""

    images: int = Field(0, ge=0, le=1_000_000, description="Held-out images whose likelihood is measured; 0: none.")
    method: LikelihoodMethod = Field(
        LikelihoodMethod.BOUND, description=f"How it is measured. {LikelihoodMethod.explained()}"
    )
    steps: int = Field(
        100, ge=2, le=100_000, description="Steps of the method; the bound takes at most the timesteps of the process."
    )
    probes: int = Field(1, ge=1, le=1000, description="Exact only: random probes of each divergence.")

    @model_validator(mode="after")
    def _probes_are_of_the_exact_method(self) -> Self:
        if self.probes != 1 and self.method is not LikelihoodMethod.EXACT:
            raise ValueError("probes is for the method exact only: leave it at 1")
        return self


class InversionConfig(Config):
    """How well held-out images come back out of the noise that the model finds for them (DDIM inversion)."""

    images: int = Field(0, ge=0, le=1_000_000, description="Held-out images that are inverted; 0: none.")
    steps: int = Field(50, ge=1, le=100_000, description="DDIM steps there, and back.")
    iterations: int = Field(
        1, ge=1, le=100, description="Evaluations of each step to the noise; more make the way back more exact."
    )


class EvaluationConfig(Config):
    """How a model bundle is measured against a dataset version."""

    extractor: Extractor = Field(
        Extractor.classifier,
        description="classifier: trained on the dataset itself; inception: InceptionV3 from a weights file.",
    )
    classifier: ClassifierConfig = Field(ClassifierConfig(), description="Training of the classifier extractor.")
    inception_weights: str | None = execution(
        None,
        description="InceptionV3 weights of the published FID port: a .safetensors or .pth file, local or s3://. "
        "The digest of the file is part of the evaluation's id.",
    )
    samples: int = Field(
        1_000, ge=16, le=1_000_000, description="Generated images to measure; at most the rows of the test split."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the samples and of the subsets of the kernel distance.")
    labels: EvaluationLabels = Field(
        EvaluationLabels.dataset,
        description="dataset: the labels of the held-out images, one for one; balanced: every class equally often.",
    )
    sampler: SamplerConfig = Field(SamplerConfig(), description="Sampler that makes the samples.")
    guidance: GuidanceConfig = Field(GuidanceConfig(), description="Guidance of the samples.")
    batch_size: int = Field(64, ge=1, le=65_536, description="Images that one worker samples together.")
    likelihood: LikelihoodConfig = later(
        LikelihoodConfig(), description="Bits per dimension of held-out images, if wanted."
    )
    inversion: InversionConfig = later(
        InversionConfig(), description="Difference between held-out images and their reconstructions, if wanted."
    )
    neighbours: int = Field(
        3, ge=1, le=100, description="k of the k-nearest-neighbour manifold of precision and recall."
    )
    kid_subsets: int = Field(50, ge=2, le=10_000, description="Random subsets that the kernel distance (KID) averages.")
    kid_subset_size: int = Field(
        1_000, ge=2, le=100_000, description="Images of each set in one subset; at most half of the smaller set."
    )

    @model_validator(mode="after")
    def _weights_are_named_when_needed(self) -> Self:
        if self.extractor is Extractor.inception and not self.inception_weights:
            raise ValueError(
                "the extractor inception needs inception_weights, the path or s3:// URI of its weights file"
            )
        if self.extractor is Extractor.classifier and self.inception_weights:
            raise ValueError(
                "inception_weights is given but the extractor is classifier: choose the extractor inception"
            )
        return self


def check_held_out_figures(field: str, config: EvaluationConfig, process: ProcessConfig) -> None:
    """The figures of held-out images suit the model's process.

    Raises:
        UserError: more steps than timesteps, or a bound that says nothing: the posterior's variance of the last steps
            of the schedule ve, which are even in the logarithm of the noise, is far below what is unknown of x0.
    """
    likelihood, inversion = config.likelihood, config.inversion
    bound = likelihood.images and likelihood.method is LikelihoodMethod.BOUND
    if bound and process.schedule is ScheduleKind.VE and process.variance is Variance.FIXED_SMALL:
        raise UserError(
            f"{field}.likelihood.method: bound says nothing for the process.schedule ve with the process.variance "
            "fixed_small: use exact."
        )
    asked = {"likelihood": likelihood.steps if bound else 0, "inversion": inversion.steps if inversion.images else 0}
    for name, steps in asked.items():
        if steps > process.timesteps:
            raise UserError(
                f"{field}.{name}.steps: {steps} is more than the {process.timesteps} timesteps of the model's process."
            )


class Approval(Choice):
    """Whether a person has the last word about a new champion."""

    NONE = "none", "the figures decide alone"
    ASK = "ask", "a version that passes by its figures becomes the champion when a person accepts it"


class GateConfig(Config):
    """When a registered model version becomes the champion."""

    first_limit: float = Field(
        50.0,
        gt=0,
        description="The first champion's Fréchet distance may be at most this multiple of the floor.",
    )
    min_accuracy: float | None = Field(
        None, ge=0, le=1, description="Least accuracy of conditional samples of any champion; ignored without labels."
    )
    resamples: int = Field(
        200, ge=20, le=100_000, description="Paired bootstrap resamples of the difference in Fréchet distance."
    )
    confidence: float = Field(
        0.95,
        gt=0.5,
        lt=1,
        description="Confidence of the two-sided bootstrap interval that a new champion has to clear.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the bootstrap.")
    approval: Approval = execution(
        Approval.NONE, description=f"Whether a person is asked before the champion changes. {Approval.explained()}"
    )
    approval_timeout_h: float = execution(
        72, gt=0, le=8760, description="Hours to wait for the answer; not answered by then is refused."
    )


_AS_TEXT = re.compile(r"^(?P<kind>\w+):(?P<steps>\d+)(?::(?P<spacing>\w+))?(?:@(?P<scale>\d+(?:\.\d+)?))?$")


class Contestant(Config):
    """One way to sample that a comparison measures. As text it is KIND:STEPS, and :SPACING and @GUIDANCE if wanted."""

    name: str | None = execution(
        None,
        min_length=1,
        max_length=60,
        description="What it is called; default: KIND:STEPS, with :SPACING unless that is trailing, other options of "
        "its sampler that are not at their defaults, as :eta=1, and @GUIDANCE if it has one of its own, with its "
        "options likewise.",
    )
    sampler: SamplerConfig = Field(description="Its sampler.")
    guidance: GuidanceConfig | None = Field(None, description="Its guidance, if not that of the comparison.")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        match = _AS_TEXT.match(value)
        if match is None:
            raise ValueError(
                f"{value!r} is none: give KIND:STEPS, as dpmpp_2m:10, and :SPACING and @GUIDANCE if wanted"
            )
        sampler = {"kind": match["kind"], "steps": int(match["steps"])}
        sampler |= {"spacing": match["spacing"]} if match["spacing"] else {}
        return {"sampler": sampler, "guidance": {"scale": float(match["scale"])} if match["scale"] else None}

    @property
    def label(self) -> str:
        """What it is called."""
        spacing = "" if self.sampler.spacing is Spacing.TRAILING else f":{self.sampler.spacing.value}"
        parts = [f"{self.sampler.kind.value}:{self.sampler.steps}{spacing}", *sampler_options(self.sampler)]
        if self.guidance is not None:
            parts[-1] += f"@{self.guidance.scale:g}"
            parts += _changed(self.guidance, "scale", "guide", "classifier")
        return self.name or ":".join(parts)


def sampler_options(sampler: SamplerConfig) -> list[str]:
    """Options of a sampler, besides kind, steps and spacing, that are not at their defaults, as `eta=1`."""
    return _changed(sampler, "kind", "steps", "spacing")


def _changed(config: Config, *but: str) -> list[str]:
    fields = {name: field.default for name, field in type(config).model_fields.items() if name not in but}
    found = {name: getattr(config, name) for name, default in fields.items() if getattr(config, name) != default}
    return [f"{name}={str(value).removesuffix('.0')}" for name, value in found.items()]


_GRID = ("ddpm:250", *(f"{kind}:{steps}" for kind in SamplerKind for steps in (25, 10)))


class ComparisonConfig(Config):
    """Which samplers are compared, on how many images, and which of them is to be as good as which.

    Every contestant makes the same images: of the same ids and classes, from the same starting noise. One seed is one
    set of images, and the seeds are the repetitions over which means and intervals are taken.
    """

    contestants: tuple[Contestant, ...] = execution(
        tuple(Contestant.model_validate(text) for text in _GRID),
        min_length=1,
        description="The samplers: each as KIND:STEPS, with :SPACING and @GUIDANCE if wanted, or with the fields "
        "sampler, guidance and name.",
    )
    reference: str | None = execution(
        None, description="Name of the contestant that the others are measured against; default: the first one."
    )
    candidate: str | None = execution(
        None, description="Name of the contestant, chosen beforehand, that is to be as good as the reference."
    )
    limit: float = execution(
        1.05, gt=0, le=100, description="The candidate's Fréchet distance may be this multiple of the reference's."
    )
    seeds: int = execution(10, ge=1, le=10_000, description="Number of seeds: sets of images of each contestant.")
    first_seed: int = execution(0, ge=0, lt=2**62, description="The first seed; the others are those that follow it.")
    images: int = Field(
        1_000,
        ge=16,
        le=1_000_000,
        description="Images of each set; at most those of the train split. The Fréchet distance depends on it.",
    )
    guidance: GuidanceConfig = Field(GuidanceConfig(), description="Guidance of contestants without one of their own.")
    batch_size: int = Field(128, ge=1, le=65_536, description="Images that one worker samples together.")

    @field_validator("contestants")
    @classmethod
    def _names_are_unique(cls, contestants: tuple[Contestant, ...]) -> tuple[Contestant, ...]:
        names = [contestant.label for contestant in contestants]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two contestants are called {name}: give one of them a name of its own")
        return contestants

    @model_validator(mode="after")
    def _who_is_named_takes_part(self) -> Self:
        names = [contestant.label for contestant in self.contestants]
        for field in ("reference", "candidate"):
            name = getattr(self, field)
            if name is not None and name not in names:
                shown = ", ".join(names[:10]) + (f", … ({len(names)} in all)" if len(names) > 10 else "")
                raise ValueError(f"the {field} {name} is not among the contestants, which are {shown}")
        return self

    @model_validator(mode="after")
    def _candidate_is_not_the_reference(self) -> Self:
        ways = {each.label: self.way_of(each) for each in self.contestants}
        if self.candidate is not None and ways[self.candidate] == ways[self.reference_name]:
            raise ValueError(
                f"the candidate {self.candidate} samples exactly as the reference {self.reference_name}, so their "
                "comparison shows nothing: name another reference"
            )
        return self

    @property
    def reference_name(self) -> str:
        return self.reference or self.contestants[0].label

    def guidance_of(self, contestant: Contestant) -> GuidanceConfig:
        return contestant.guidance or self.guidance

    def way_of(self, contestant: Contestant) -> str:
        """A digest of how a contestant samples: of everything but its name."""
        guidance = self.guidance_of(contestant)
        return digest(contestant.sampler, guidance, guidance.models)

    @property
    def all_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)
