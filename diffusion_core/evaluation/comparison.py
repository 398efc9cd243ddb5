"""What a comparison of samplers found: a standing for each contestant, the candidate's verdict, a table. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from pydantic import Field

from diffusion_core.config import Config
from diffusion_core.diffusion.config import GuidanceConfig, ProcessConfig, check_guidance_scale, check_sampler
from diffusion_core.diffusion.kinds import Spacing
from diffusion_core.evaluation.config import ComparisonConfig, Contestant, sampler_options

CONFIDENCE = 0.95


class Mean(Config):
    """A mean over seeds with its standard error, which is None where there is one seed only."""

    mean: float
    error: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(mean=fmean(values), error=error)


class Ratio(Config):
    """A Fréchet distance as a multiple of the reference's, of the same seeds; see `paired_ratio`."""

    ratio: float = Field(description="Geometric mean of the seeds' ratios.")
    low: float | None = Field(None, description="Lower end of the 95 % interval; None with one seed.")
    high: float | None = Field(None, description="Upper end of the 95 % interval; None with one seed.")
    bound: float | None = Field(None, description="One-sided upper 95 % bound; None with one seed.")


class Standing(Config):
    """How one contestant did, over all seeds."""

    name: str
    series: str = Field(description="What it has in common with those that differ in the number of steps alone.")
    kind: str = Field(description="Kind of its sampler.")
    steps: int
    guidance: str = Field(description="Its guidance scale, and whether only in an interval of noise levels.")
    evaluations: float = Field(description="Rows given to networks for one image; a guided call counts two.")
    distance: Mean = Field(description="Fréchet distance to the train split.")
    precision: Mean
    recall: Mean
    accuracy: Mean | None = Field(
        description="Share of images recognised as the class asked for; None without classes."
    )
    ratio: Ratio | None = Field(description="Against the reference; None if there is none, or a distance is 0.")
    distances: list[float] = Field(description="The Fréchet distance of each seed.")


class Floor(Config):
    """The figures of held-out real images. The Fréchet distance falls with their number, so that stands beside it."""

    images: int
    distance: float
    precision: float
    recall: float
    accuracy: float | None = None


class Verdict(Config):
    """Whether the candidate is as good as the reference, by the upper bound of the ratio."""

    candidate: str
    reference: str
    evaluations: float
    ratio: float
    bound: float | None
    limit: float
    within: bool = Field(description="True if the bound is at most the limit.")
    sentence: str


class Comparison(Config):
    """Everything that a comparison found; `comparison.json` holds it."""

    schema_version: int = 1
    bundle_digest: str
    images_seen: int
    dataset: str = Field(description="Name and version of the dataset.")
    configuration: dict[str, Any]
    distance_name: str = Field(description="fid with Inception's features, else frechet_distance.")
    images: int = Field(description="Images of each set, N.")
    seeds: list[int]
    reference: str
    standings: list[Standing] = Field(description="In the order of the contestants, without those that failed.")
    failed: dict[str, str] = Field(description="Why, by the name of each contestant that could not be measured.")
    floor: Floor
    verdict: Verdict | None


Cell = Mapping[str, float]
"""What one contestant's images of one seed gave: evaluations, distance, precision, recall and perhaps accuracy."""


def check_contestants(config: ComparisonConfig, process: ProcessConfig, class_names: Sequence[str]) -> None:
    """Every contestant suits the model. `UserError` about the first that does not."""
    for contestant in config.contestants:
        guidance = config.guidance_of(contestant)
        check_sampler(f"{contestant.label}: sampler", contestant.sampler, process)
        check_guidance_scale(f"{contestant.label}: guidance", guidance, class_names)


def paired_ratio(distances: Sequence[float], reference: Sequence[float]) -> Ratio | None:
    """The ratio of two contestants' Fréchet distances, by t-statistics on the logarithms of the seeds' ratios.

    Seed i of both has the same classes and the same starting noise, so what the two have in common cancels within a
    seed. A ratio is bounded below by 0 and skewed while its logarithm is neither, and what is wanted is a bound on a
    ratio. The distance of a set of N images is itself a mean over images, so its logarithm varies nearly normally from
    seed to seed: with the standard deviation estimated from the same n seeds, that is Student's t with n - 1 degrees of
    freedom. The bound asks one question (not much worse?), so it is one-sided, and a little inside the interval.

    Returns:
        None where a distance is 0, and so no ratio exists.
    """
    if min(*distances, *reference) <= 0:
        return None
    logs = [math.log(a / b) for a, b in zip(distances, reference, strict=True)]
    middle = fmean(logs)
    if len(logs) == 1:
        return Ratio(ratio=math.exp(middle))
    from scipy.stats import t as student

    error = stdev(logs) / math.sqrt(len(logs))
    two_sided = float(student.ppf(0.5 + CONFIDENCE / 2, len(logs) - 1)) * error
    one_sided = float(student.ppf(CONFIDENCE, len(logs) - 1)) * error
    return Ratio(
        ratio=math.exp(middle),
        low=math.exp(middle - two_sided),
        high=math.exp(middle + two_sided),
        bound=math.exp(middle + one_sided),
    )


def standing(config: ComparisonConfig, contestant: Contestant, cells: Sequence[Cell], of: Sequence[Cell]) -> Standing:
    """The standing of a contestant, from its cells and the reference's cells of the same seeds."""

    def mean(name: str) -> Mean:
        return Mean.of([cell[name] for cell in cells])

    return Standing(
        name=contestant.label,
        series=_series(config, contestant),
        kind=contestant.sampler.kind.value,
        steps=contestant.sampler.steps,
        guidance=_guidance(config, contestant),
        evaluations=mean("evaluations").mean,
        distance=mean("distance"),
        precision=mean("precision"),
        recall=mean("recall"),
        accuracy=mean("accuracy") if "accuracy" in cells[0] else None,
        ratio=paired_ratio([cell["distance"] for cell in cells], [cell["distance"] for cell in of]) if of else None,
        distances=[cell["distance"] for cell in cells],
    )


def _series(config: ComparisonConfig, contestant: Contestant) -> str:
    """What a contestant has in common with those, and only those, that differ in the number of steps alone.

    Where the words are the same though the guidance is not, as with another guide, they get a number.
    """
    words = _series_in_words(config, contestant)
    alike = [each for each in config.contestants if _series_in_words(config, each) == words]
    ways = list(dict.fromkeys(_but_for_steps(config, each) for each in alike))
    number = 1 + ways.index(_but_for_steps(config, contestant))
    return words if number == 1 else f"{words} ({number})"


def _series_in_words(config: ComparisonConfig, contestant: Contestant) -> str:
    guidances = {each.label: f"{_guidance(config, each)}{_options(config, each)}" for each in config.contestants}
    spacing, several = contestant.sampler.spacing, len(set(guidances.values())) > 1
    parts = [contestant.sampler.kind.value, "" if spacing is Spacing.TRAILING else spacing.value]
    parts += sampler_options(contestant.sampler)
    return ", ".join(filter(None, [*parts, f"guidance {guidances[contestant.label]}" if several else ""]))


def _but_for_steps(config: ComparisonConfig, contestant: Contestant) -> str:
    sampler = contestant.sampler.model_copy(update={"steps": 1})
    return config.way_of(contestant.model_copy(update={"sampler": sampler}))


def _options(config: ComparisonConfig, contestant: Contestant) -> str:
    """The interval of log-SNR where a contestant is guided, and how much is rescaled, as ` (log-SNR from -2 to 2)`."""
    guidance = config.guidance_of(contestant)
    if _is_neutral(guidance):
        return ""
    low, high = guidance.min_log_snr, guidance.max_log_snr
    ends = ["" if low is None else f"from {low:g}", "" if high is None else f"to {high:g}"]
    bounds = " ".join(filter(None, ["log-SNR" if low is not None or high is not None else "", *ends]))
    options = ", ".join(filter(None, [bounds, f"rescale={guidance.rescale:g}" if guidance.rescale else ""]))
    return f" ({options})" if options else ""


def _is_neutral(guidance: GuidanceConfig) -> bool:
    return guidance.scale == 1 and not guidance.classifier_scale


def _guidance(config: ComparisonConfig, contestant: Contestant) -> str:
    """The guidance of a contestant in a word, as `1.5`, `1.5 in part`, `2 by guide`, or `1 + 3 by classifier`."""
    guidance = config.guidance_of(contestant)
    words = [f"{guidance.scale:g}"]
    words += ["by guide"] if "guide" in guidance.models else []
    words += [f"+ {guidance.classifier_scale:g} by classifier"] if guidance.classifier_scale else []
    everywhere = guidance.min_log_snr is None and guidance.max_log_snr is None
    words += [] if _is_neutral(guidance) or everywhere else ["in part"]
    return " ".join(words)


def verdict(config: ComparisonConfig, standings: Sequence[Standing], failed: Mapping[str, str]) -> Verdict | None:
    """The candidate's, in words too; None without a candidate, or where there is no ratio to judge by."""
    candidate = next((each for each in standings if each.name == config.candidate), None)
    if candidate is None or candidate.ratio is None or config.reference_name in failed:
        return None
    ratio, bound = candidate.ratio.ratio, candidate.ratio.bound
    within = bound is not None and bound <= config.limit
    more = f"the limit {config.limit:g}"
    if bound is None:
        why = "one seed gives no bound, so nothing is shown: use more seeds"
    elif within:
        why = f"its upper 95 % bound {bound:.3f} is within {more}"
    elif ratio <= config.limit:
        why = f"its upper 95 % bound {bound:.3f} is above {more}: not shown with {config.seeds} seeds"
    else:
        why = f"that alone is above {more} (upper 95 % bound {bound:.3f})"
    return Verdict(
        candidate=candidate.name,
        reference=config.reference_name,
        evaluations=candidate.evaluations,
        ratio=ratio,
        bound=bound,
        limit=config.limit,
        within=within,
        sentence=f"{candidate.name} with {candidate.evaluations:g} network evaluations an image has {ratio:.3f} times "
        f"the Fréchet distance of {config.reference_name}; {why}.",
    )


def table(found: Comparison) -> str:
    """The standings as a Markdown table whose columns are aligned, so that it reads as plain text too."""
    distance = "FID" if found.distance_name == "fid" else "Fréchet distance"
    ratio = f"ratio to {found.reference} (95 %)"
    head = ["sampler", "guidance", "evaluations", distance, ratio, "precision", "recall", "accuracy"]
    rows = []
    for each in found.standings:
        chosen = found.verdict is not None and found.verdict.candidate == each.name
        rows.append(
            [
                f"**{each.name}**" if chosen else each.name,
                each.guidance,
                f"{each.evaluations:g}",
                shown(each.distance),
                _interval(each),
                shown(each.precision),
                shown(each.recall),
                shown(each.accuracy),
            ]
        )
    floor = found.floor
    of_floor = [floor.distance, None, floor.precision, floor.recall, floor.accuracy]
    figures = ["–" if value is None else f"{value:.3f}" for value in of_floor]
    rows.append([f"held-out real images (N = {floor.images:,})", "–", "–", *figures])
    rows += [[name, "failed", *["–"] * 6] for name in found.failed]
    said = [f"{name} failed: {why}." for name, why in found.failed.items()]
    return "\n\n".join([_aligned(head, rows), *said])


def document(found: Comparison, picture: str) -> str:
    """`comparison.md`: the table with what it is about, and the picture."""
    lines = [
        "# Samplers compared",
        f"{found.images:,} images for each of {len(found.seeds)} seeds ({found.seeds[0]} to {found.seeds[-1]}); means "
        f"± standard errors. Dataset {found.dataset}, model `{found.bundle_digest}`.",
        table(found),
        *([found.verdict.sentence] if found.verdict else []),
        f"![Fréchet distance, recall and accuracy against network evaluations]({picture})",
    ]
    return "\n\n".join(lines) + "\n"


def shown(value: Mean | None) -> str:
    """A mean with its error, as 2.608 ± 0.024."""
    if value is None:
        return "–"
    return f"{value.mean:.3f}" + ("" if value.error is None else f" ± {value.error:.3f}")


def _interval(each: Standing) -> str:
    if each.ratio is None:
        return "–"
    if each.ratio.low is None or each.ratio.low == each.ratio.high:  # of the reference itself
        return f"{each.ratio.ratio:.3f}"
    return f"{each.ratio.ratio:.3f} ({each.ratio.low:.3f}–{each.ratio.high:.3f})"


def _aligned(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [head, ["-" * width for width in widths], *rows]
    ]
    return "\n".join(lines)
