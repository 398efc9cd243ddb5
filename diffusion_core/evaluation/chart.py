"""The plot of a comparison: Fréchet distance, recall and accuracy against network evaluations, one line a sampler."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

from diffusion_core.evaluation.comparison import Comparison, Mean, Standing

# The muted palette of Paul Tol's "Colour schemes" (2021) and black, told apart with every kind of colour vision.
_COLOURS = (
    "#332288",
    "#CC6677",
    "#117733",
    "#88CCEE",
    "#882255",
    "#DDCC77",
    "#44AA99",
    "#AA4499",
    "#999933",
    "#000000",
)
_MARKERS = "osD^vPX*<>"
_LINES = ("-", "--", "-.", ":")  # of one sampler: with other guidance, or at other times
_GREY = "#666666"
_Points = list[tuple[float, Mean]]


def picture(found: Comparison) -> bytes:
    """A PNG of about 1100 by 620 pixels. Bars are standard errors over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    by_class = any(each.accuracy for each in found.standings)
    panels = figure.subplot_mosaic(
        [["distance", "recall"], ["distance", "accuracy" if by_class else "precision"]], width_ratios=[2, 1]
    )
    for name, axes in panels.items():
        _draw(axes, found, name)
    large = panels["distance"]
    large.set_yscale("log")
    large.set_ylabel("FID" if found.distance_name == "fid" else "Fréchet distance")
    _level_ticks(large)
    large.set_title(
        f"{found.dataset.partition('/')[0]}: {found.images:,} images × {len(found.seeds)} seeds", fontsize=10
    )
    handles, labels = large.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw(axes: Any, found: Comparison, name: str) -> None:
    """One panel: a line for each series, and horizontal ones for the reference and for real images."""
    kinds: list[str] = []
    seen: list[str] = []
    for series, standings in _series(found.standings).items():
        points, kind = _points(standings, name), standings[0].kind
        seen.append(kind)
        kinds += [kind] if kind not in kinds else []
        number = kinds.index(kind)
        axes.errorbar(
            [evaluations for evaluations, _ in points],
            [value.mean for _, value in points],
            yerr=[value.error or 0.0 for _, value in points],
            label=series,
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            linestyle=_LINES[(seen.count(kind) - 1) % len(_LINES)],
            markersize=5,
            markerfacecolor=_COLOURS[number % len(_COLOURS)] if seen.count(kind) == 1 else "white",
            linewidth=1.3,
            capsize=2,
        )
    reference = next((each for each in found.standings if each.name == found.reference), None)
    if reference is not None and (value := getattr(reference, name)) is not None:
        axes.axhline(value.mean, color=_GREY, linestyle="--", linewidth=1, label=reference.name)
    if (real := getattr(found.floor, name)) is not None:
        text = f"real images (N = {found.floor.images:,})"
        axes.axhline(real, color=_GREY, linestyle=":", linewidth=1.3, label=text)
    candidate = next((each for each in found.standings if found.verdict and each.name == found.verdict.candidate), None)
    if candidate is not None and (value := getattr(candidate, name)) is not None:
        axes.plot(
            candidate.evaluations, value.mean, "o", ms=13, mfc="none", mec="black", label=f"candidate {candidate.name}"
        )
    axes.set_xscale("log")
    axes.set_xlabel("network evaluations an image")
    axes.set_ylabel(name)
    _level_ticks(axes, "x")
    axes.grid(alpha=0.25, which="both", linewidth=0.5)


def _series(standings: Iterable[Standing]) -> dict[str, list[Standing]]:
    """Standings by series, these as they come, each in the order of its evaluations."""
    found: dict[str, list[Standing]] = {}
    for each in standings:
        found.setdefault(each.series, []).append(each)
    return {series: sorted(those, key=lambda each: each.evaluations) for series, those in found.items()}


def _points(standings: Iterable[Standing], name: str) -> _Points:
    return [(each.evaluations, value) for each in standings if (value := getattr(each, name)) is not None]


def _level_ticks(axes: Any, which: str = "y") -> None:
    """Plain numbers at a logarithmic axis, of which the usual ticks show few or none within a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis, subs = (axes.yaxis, (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)) if which == "y" else (axes.xaxis, (1.0, 2.0, 5.0))
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
