"""The loss curve of a run, of the figures that are kept in its directory."""

from __future__ import annotations

import io

from diffusion_core.store import Directory
from diffusion_core.training.recorder import kept_figures

_MAX_POINTS = 500  # more cannot be told apart in the picture


def loss_curve(run: Directory) -> bytes | None:
    """A PNG of 720 by 300 pixels: the training loss against images seen. None if the run kept no two figures."""
    points = [(seen, figures["loss"]) for seen, figures in kept_figures(run) if "loss" in figures]
    if len(points) < 2:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(7.2, 3), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*zip(*_thinned(points), strict=True), color="#332288", linewidth=1.5)
    losses = sorted(loss for _, loss in points)
    if losses[0] > 0 and losses[-1] > 4 * losses[len(losses) // 2]:  # what came after the first steps would be flat
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("images seen")
    axes.set_ylabel("training loss")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.25, linewidth=0.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _thinned(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most `_MAX_POINTS`, each the mean of its neighbours."""
    size = -(-len(points) // _MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups]
