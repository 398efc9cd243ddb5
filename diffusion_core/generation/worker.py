"""One worker of a generation run: image ids in, pixels out, shard by shard into the set."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion_core.bundle import Bundle, check_guide, load_bundle
from diffusion_core.config import UserError
from diffusion_core.diffusion import Denoiser, GaussianProcess, KeyedNoise, build_sampler, images_from_network
from diffusion_core.diffusion.schedules import Time
from diffusion_core.generation.config import GenerationConfig, SamplingPrecision
from diffusion_core.generation.imageset import ImageSet, open_imageset
from diffusion_core.generation.plan import Shard, ShardTask
from diffusion_core.store import StoreFull
from diffusion_core.store.patience import StoreUnavailable

LabelsOf = Callable[[np.ndarray], np.ndarray | None]


class NonFiniteImages(ArithmeticError):
    """The network gave infinite or undefined values for some images. Trying again gives the same."""


class Generator:
    """Makes the images of a bundle: a pure function of the bundle, the configuration, the image ids and their classes.

    Batches are aligned to absolute image ids: image i is computed in slot `i % batch_size` of a batch of exactly
    `batch_size` images, whatever was asked for, so that every kernel sees the same shape and every image the same
    place in it. Surplus slots are computed and dropped.

    Args:
        bundle: a loaded bundle; its network is moved to the layout that suits the device.
        config: how to sample; the models that guide are loaded from where it says.
        device: where the bundle's network is.
    """

    def __init__(self, bundle: Bundle, config: GenerationConfig, device: str | torch.device = "cpu") -> None:
        self.config, self.bundle, self.device = config, bundle, torch.device(device)
        if self.device.type == "cpu":
            torch.set_num_threads(config.threads)
        else:
            torch.backends.cudnn.benchmark = False
            torch.backends.cudnn.deterministic = True
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
        # Measured: channels_last is the faster layout on GPUs, and on CPUs the slower one (by 1.7 in bfloat16).
        self._layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        bundle.network.to(memory_format=self._layout)  # type: ignore[call-overload]
        self._network = _Watched(bundle.network, config.precision, self.device, self._layout)
        self._guide = self._load_guide("guide", config.precision)
        self._classifier = self._load_guide("classifier", SamplingPrecision.FLOAT32)  # its gradient is wanted
        others = [guide[0] for guide in (self._guide, self._classifier) if guide is not None]
        self._watched = [self._network, *others]
        self._sampler = build_sampler(config.sampler, bundle.process)
        height, width, channels = bundle.config.image_shape
        self._shape = (channels, height, width)

    def _load_guide(self, name: str, precision: SamplingPrecision) -> tuple[_Watched, GaussianProcess] | None:
        """Another model that takes part, on the same device, with its process; None if there is none."""
        uri = self.config.guidance.models.get(name)
        if uri is None:
            return None
        guide, ours = load_bundle(uri, self.device), self.bundle.config
        check_guide(name, "generation.guidance", guide.config, ours.process, ours.image_shape, ours.class_names)
        guide.network.to(memory_format=self._layout)  # type: ignore[call-overload]
        return _Watched(guide.network, precision, self.device, self._layout), guide.process

    def _denoiser(self, cond: dict[str, Tensor] | None, count: int) -> Denoiser:
        """That of one batch."""
        for watched in self._watched:
            watched.watch(count)
        guide = self._guide[0] if self._guide else None
        classifier = self._logits if self._classifier else None
        threshold, guidance = self.config.sampler, self.config.guidance
        return Denoiser(self.bundle.process, self._network, cond, guidance, threshold, guide, classifier)

    def _logits(self, x_t: Tensor, t: Time) -> Tensor:
        assert self._classifier is not None
        network, process = self._classifier
        return network(*process.network_inputs(x_t, t))

    @property
    def networks(self) -> list[nn.Module]:
        """The networks that are called to make images: the bundle's, and those that guide."""
        return list(self._watched)

    @property
    def made_on(self) -> str:
        """The device model and library version that the low bits of the pixels depend on."""
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)}, torch {torch.__version__}"
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"

    def images(
        self,
        image_ids: np.ndarray,
        labels: np.ndarray | LabelsOf | None,
        done: Callable[[int], None] = lambda count: None,
    ) -> np.ndarray:
        """Images (N, H, W, C) uint8 of image ids (N,) int64, in their order; an id may occur more than once.

        Args:
            labels: classes (N,) int64, or the function from ids to classes, or None for an unconditional model.
            done: called after each batch with the number of images that it gave.

        Raises:
            NonFiniteImages: the network gave infinite or undefined values for one of the images.
        """
        ids = np.asarray(image_ids, dtype=np.int64)
        channels, height, width = self._shape
        out = np.zeros((len(ids), height, width, channels), dtype=np.uint8)
        given = labels(ids) if callable(labels) else labels
        for places in self._batches(ids):
            size = self.config.batch_size
            slots = ids[places] % size
            batch = ids[places][0] // size * size + np.arange(size)
            classes = None
            if given is not None:
                around = labels(batch) if callable(labels) else None
                classes = np.full(size, given[places][0]) if around is None else around
                classes[slots] = given[places]
            out[places] = self._batch(batch, classes, slots)
            done(len(places))
        return out

    def _batches(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        """Places in `ids` that are computed together: those of one aligned batch, each slot at most once."""
        order = np.argsort(ids, kind="stable")
        ordered = ids[order]
        repeats = np.arange(len(ids)) - np.searchsorted(ordered, ordered)
        keys = np.stack([ordered // self.config.batch_size, repeats], axis=1)
        _, starts = np.unique(keys, axis=0, return_inverse=True)
        for n in range(starts.max() + 1 if len(ids) else 0):
            yield order[starts.reshape(-1) == n]

    @torch.inference_mode()
    def _batch(self, batch: np.ndarray, classes: np.ndarray | None, slots: np.ndarray) -> np.ndarray:
        """The images in some slots of one whole batch."""
        noise = KeyedNoise(self.config.seed, torch.from_numpy(batch).to(self.device))
        cond: dict[str, Tensor] | None = None
        if classes is not None:
            cond = {"label": torch.from_numpy(classes.astype(np.int64)).to(self.device)}
        denoiser = self._denoiser(cond, len(batch))
        x_T = noise.initial(self._shape, device=self.device).contiguous(memory_format=self._layout)
        x_0 = self._sampler.sample(denoiser, x_T, noise)
        finite = torch.isfinite(x_0).flatten(1).all(dim=1)
        bad = torch.stack([~finite, *(watched.bad for watched in self._watched)]).any(dim=0).cpu().numpy()[slots]
        if bad.any():
            ids = batch[slots][bad]
            shown = ", ".join(map(str, ids[:5])) + (", …" if len(ids) > 5 else "")
            raise NonFiniteImages(f"the network gave infinite or undefined values for image {shown}")
        return images_from_network(x_0[torch.from_numpy(slots).to(self.device)])


class _Watched(nn.Module):
    """The network in the precision asked for, remembering which images it ever gave a non-finite value for.

    Clamping would turn an infinity into an innocent pixel, so it has to be seen here, before the sampler.
    """

    def __init__(
        self, network: nn.Module, precision: SamplingPrecision, device: torch.device, layout: torch.memory_format
    ) -> None:
        super().__init__()
        self.network = _rounded(network) if precision is SamplingPrecision.BFLOAT16 else network
        self.null_label = getattr(network, "null_label", 0)  # the label that means no label
        self.precision, self.device, self.layout = precision, device, layout
        self.bad = torch.zeros(0, dtype=torch.bool)

    def watch(self, count: int) -> None:
        """Begin a batch of `count` images."""
        self.bad = torch.zeros(count, dtype=torch.bool, device=self.device)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        labels = {} if label is None else {"label": label}
        with self._cast():
            out = self.network(x_t.contiguous(memory_format=self.layout), t, **labels).float()
        finite = torch.isfinite(out).flatten(1).all(dim=1)
        self.bad = self.bad | ~finite.view(-1, len(self.bad)).all(dim=0)  # guidance doubles the batch
        return out

    def _cast(self) -> AbstractContextManager[Any]:
        if self.precision is SamplingPrecision.BFLOAT16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()


def _rounded(network: nn.Module) -> nn.Module:
    """A copy whose weights are rounded once, where autocast would round them at every call: to the same numbers."""
    copied = copy.deepcopy(network)
    for module in copied.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(torch.bfloat16)
    return copied


class ShardWorker:
    """Makes and commits shards of one set; whatever goes wrong with a shard becomes a row, and the next one is made.

    Nothing is loaded before the first shard, so that a worker which cannot even load the model reports it as the error
    of its shards.

    Args:
        tally: told the number of images whenever some are done.
    """

    def __init__(self, task: ShardTask, tally: Callable[[int], None] = lambda images: None) -> None:
        self.task, self._tally = task, tally

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """A plan row {shard, first_image_id, count} → the same with `outcome` (made, found or failed), `error`,
        `final` (trying again would not help), `store_away` (it was the store's fault alone),
        `store_full` (and so for every other shard) and `seconds`."""
        shard = Shard(int(row["shard"]), int(row["first_image_id"]), int(row["count"]))
        started, error, final, away, outcome = time.monotonic(), "", False, False, "failed"
        full = False
        try:
            outcome = self.make(shard)
        except StoreFull as caught:
            error, full = str(caught), True
        except (UserError, StoreUnavailable) as caught:
            error, away = str(caught), isinstance(caught, StoreUnavailable)
        except Exception as caught:  # promise 5: a poisonous item cannot stop the rest
            error, final = f"{type(caught).__name__}: {caught}", isinstance(caught, NonFiniteImages)
        return {
            "shard": shard.number,
            "first_image_id": shard.first_image_id,
            "count": shard.count,
            "outcome": outcome,
            "error": error,
            "final": final,
            "store_away": away,
            "store_full": full,
            "seconds": time.monotonic() - started,
        }

    def make(self, shard: Shard) -> str:
        """Make and commit one shard; 'found' if it was committed already, else 'made'."""
        if self._set.record(shard) is not None:
            self._tally(shard.count)
            return "found"
        generator = self.generator
        ids = np.arange(shard.first_image_id, shard.stop, dtype=np.int64)
        images = generator.images(ids, self._set.labels.of, self._tally)
        self._set.commit(shard, images, self.task.model_version, generator.made_on)
        return "made"

    @cached_property
    def generator(self) -> Generator:
        bundle = load_bundle(self.task.bundle_uri, self.task.device)
        if bundle.digest != self._set.description.bundle_digest:
            raise UserError(f"The bundle {self.task.bundle_uri} is not the one that the image set was planned with.")
        return Generator(bundle, self._set.guided_by(self.task.guide_uris), self.task.device)

    @cached_property
    def _set(self) -> ImageSet:
        return open_imageset(self.task.set_uri)


def reproduce(
    set_uri: str, image_id: int, bundle_uri: str | None = None, device: str = "cpu"
) -> tuple[np.ndarray, bool]:
    """Make one image of a set again: its pixels (H, W, C) uint8, and whether their digest is the recorded one.

    Args:
        bundle_uri: where the bundle is now, if not where it was.
    """
    from diffusion_core.generation.formats import pixel_digest

    images = open_imageset(set_uri)
    located = images.locate(image_id)
    task = ShardTask(set_uri, bundle_uri or images.description.bundle_uri, located.record["model_version"], device)
    image = ShardWorker(task).generator.images(np.array([image_id]), images.labels.of)[0]
    return image, pixel_digest(image) == located.sha256
