"""An average of the weights of any length, made after training out of snapshots of two (Karras et al. 2024, "EDM2").

`snapshots/<images_seen>/` holds both averages of a run that keeps power-function ones, written like a checkpoint. They
lie on a grid: at multiples of `ema_snapshot_every_images`, and where there would be more than `ema_keep_snapshots`, of
twice that, and so on. Besides there is one wherever training ended with a bundle. So which snapshots there are follows
from the images seen and from where training ended, however often the run was interrupted.

An average is made of all the snapshots that there are up to its time. A run that goes on thins those of its earlier
ends, and a distance that is changed in mid-run, to a shorter or a longer one, leaves of those from before only the ones
on the new grid. What they are still good for is told by the error of the profile, which is known without training.
"""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter

import torch

from diffusion_core.bundle import BundleConfig, load_bundle, save_bundle
from diffusion_core.config import UserError
from diffusion_core.store import layout
from diffusion_core.training.checkpoint import (
    Checkpoint,
    DamagedError,
    Tensors,
    checkpoints,
    delete_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from diffusion_core.training.config import EmaKind, TrainingConfig
from diffusion_core.training.preview import preview
from diffusion_core.training.profiles import gamma_of, reconstruction_error, reconstruction_weights
from diffusion_core.training.run import RunDirectory, TrainSpec

GREATEST_ERROR = 0.1  # of an average's profile, relative L2


def snapshot_distance(config: TrainingConfig, images_seen: int) -> int:
    """Images between two snapshots of a run that has come so far; 0 for a run without."""
    if config.ema is not EmaKind.POWER:
        return 0
    distance = config.ema_snapshot_every_images
    while images_seen // distance > config.ema_keep_snapshots:
        distance *= 2
    return distance


def save_snapshot(run: RunDirectory, config: TrainingConfig, images_seen: int, averages: dict[str, Tensors]) -> None:
    """Store the averages, and delete the snapshots that are not on the grid any more."""
    distance = snapshot_distance(config, images_seen)
    meta = {"sigma_rels": list(config.ema_sigma_rels)}
    save_checkpoint(run.snapshots, Checkpoint(images_seen, averages, meta))
    for earlier in checkpoints(run.snapshots):
        kept = on_grid(earlier, distance, config.batch_size) or run.bundle(earlier).exists(layout.BUNDLE)
        if earlier < images_seen and not kept:
            delete_checkpoint(run.snapshots / str(earlier))


def on_grid(images_seen: int, distance: int, batch_size: int) -> bool:
    """Whether the step that led to this count passed a multiple of the distance."""
    return images_seen // distance > (images_seen - batch_size) // distance


def export(run: RunDirectory, sigma_rel: float, images_seen: int | None = None) -> str:
    """A bundle of a finished run with an average of another length: its URI, `bundles/<images_seen>-<sigma_rel>`.

    Args:
        sigma_rel: relative width of the average, in [0.01, 0.28].
        images_seen: at which end of training; default: the last one.

    Raises:
        UserError: the run keeps no power-function averages, did not end there, or has too few snapshots for the width.
    """
    if not 0.01 <= sigma_rel <= 0.28:
        raise UserError(f"sigma_rel: {sigma_rel:g} is not accepted: it must be at least 0.01 and at most 0.28.")
    seen = _end(run, images_seen)
    place = run.directory / layout.averaged_bundle(seen, sigma_rel)
    if place.exists(layout.BUNDLE):
        return place.uri
    bundle = load_bundle(run.bundle(seen))
    weights, error = reconstruct(run, sigma_rel, seen)
    bundle.network.load_state_dict(weights)
    config = BundleConfig.model_validate({**dict(bundle.config), "ema_sigma_rel": sigma_rel, "ema_error": error})
    if config.network.kind == "classifier":  # its picture shows no samples
        save_bundle(place, config, bundle.network.state_dict(), run.bundle(seen).read(layout.SAMPLES))
        return place.uri
    training = TrainSpec.model_validate(run.directory.read_json(layout.RUN)["spec"]).training
    samples = preview(
        bundle.network,
        bundle.process,
        config.image_shape,
        config.num_classes,
        count=training.preview_images,
        steps=min(training.preview_steps, config.process.timesteps),
        seed=training.seed,
        device=torch.device("cpu"),
    )
    save_bundle(place, config, bundle.network.state_dict(), samples)
    return place.uri


def reconstruct(run: RunDirectory, sigma_rel: float, images_seen: int) -> tuple[Tensors, float]:
    """The average of relative width `sigma_rel` at `images_seen`, from all the snapshots up to there.

    Returns:
        A state of the network, float32, summed in float64 with one earlier snapshot in memory at a time; and the
        relative L2 error of its profile, from 0 to 0.1.

    Raises:
        UserError: the error would be greater, or a snapshot is damaged.
    """
    last = _read(run, images_seen)
    times = [seen for seen in checkpoints(run.snapshots) if seen <= images_seen]
    mixed, error = _mixture(times, last.meta["sigma_rels"], sigma_rel)
    if error > GREATEST_ERROR:
        raise UserError(_out_of_reach(times, last.meta["sigma_rels"], sigma_rel, error))
    weights = iter(mixed)
    sums = {
        name: torch.zeros(x.shape, dtype=torch.float64)
        for name, x in last.parts["ema"].items()
        if x.is_floating_point()
    }
    for seen in times:
        parts = last.parts if seen == images_seen else _read(run, seen).parts
        for part in ("ema", "ema_2"):
            weight = next(weights)
            for name, total in sums.items():
                total.add_(parts[part][name].double(), alpha=weight)
    return {name: sums[name].to(x.dtype) if name in sums else x for name, x in last.parts["ema"].items()}, error


def _mixture(times: list[int], widths: list[float], sigma_rel: float) -> tuple[list[float], float]:
    """The weight of each average of each snapshot in one of width `sigma_rel` at the last time; its profile's error."""
    gammas = [gamma_of(width) for width in widths] * len(times)
    ends = [time for time in times for _ in widths]
    wanted = gamma_of(sigma_rel), times[-1]
    weights = reconstruction_weights(gammas, ends, *wanted)
    return weights.tolist(), reconstruction_error(weights, gammas, ends, *wanted)


def _out_of_reach(times: list[int], widths: list[float], sigma_rel: float, error: float) -> str:
    """What to say of a width that these snapshots do not make, with those that they do."""
    candidates = sorted({*widths, *(step / 100 for step in range(1, 29))})
    reached = [(width, _mixture(times, widths, width)[1] <= GREATEST_ERROR) for width in candidates]
    spans = [[width for width, _ in span] for fits, span in groupby(reached, key=itemgetter(1)) if fits]
    shown = " and ".join(f"{span[0]:g} to {span[-1]:g}" if len(span) > 1 else f"{span[0]:g}" for span in spans)
    count = f"{len(times)} snapshot{'s' if len(times) > 1 else ''}"
    return (
        f"sigma_rel: {sigma_rel:g} is not accepted: the profile made of the {count} up to {times[-1]} images would be "
        f"off by {100 * error:.0f} %, and at most {100 * GREATEST_ERROR:.0f} % is accepted; widths of {shown} can be "
        "made; a shorter training.ema_snapshot_every_images makes more snapshots, up to training.ema_keep_snapshots."
    )


def _read(run: RunDirectory, images_seen: int) -> Checkpoint:
    try:
        return read_checkpoint(run.snapshots, images_seen)
    except DamagedError as error:
        raise UserError(f"No other average can be made of this run: {error}") from error


def _end(run: RunDirectory, images_seen: int | None) -> int:
    """Where training ended with a bundle and a snapshot."""
    ends = [seen for seen in checkpoints(run.snapshots) if run.bundle(seen).exists(layout.BUNDLE)]
    if not ends:
        raise UserError(
            f"The run {run.run_id} has no snapshots to make another average of: it takes training.ema = power, and a "
            "training that has ended."
        )
    if images_seen is not None and images_seen not in ends:
        raise UserError(
            f"images_seen: the run {run.run_id} did not end at {images_seen}, but at {', '.join(map(str, ends))}."
        )
    return ends[-1] if images_seen is None else images_seen
