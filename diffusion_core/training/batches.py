"""What one optimizer step sees: a fixed list of microbatches, dealt over the processes, with noise by run position.

Run position p is the p-th image of the run. Batch k holds the positions k*B to (k+1)*B - 1, cut into microbatches of M;
image, flip, timestep, noise and dropped label of a position depend on (seed, position) alone. How many processes there
are decides who computes what, and never what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion_core.data import Batch, Loader
from diffusion_core.diffusion import images_to_network, keyed_normal, keyed_uniform
from diffusion_core.training.config import TrainingConfig
from diffusion_core.training.world import World


@dataclass(frozen=True)
class Microbatch:
    """One forward and backward pass, on the training device.

    x0 and noise: (N, C, H, W) float32; t: (N,) int64 timesteps, or float64 times where time is
    continuous; label: (N,) int64 or None; weight: 1, or 0 for a filler.
    `first` is the run position of the first image.
    """

    x0: Tensor
    noise: Tensor
    t: Tensor
    label: Tensor | None
    first: int
    weight: float


def deal(batch_size: int, microbatch_size: int, rank: int, size: int) -> list[tuple[int, int, float]]:
    """(first, last, weight) of this rank's microbatches, as offsets in the batch.

    Microbatch i goes to rank i % size, so that ranks differ by at most one. A rank without any gets the first
    microbatch with weight 0, because every rank must take part in the exchange of gradients.
    """
    cuts = range(0, batch_size, microbatch_size)
    mine = [(first, min(first + microbatch_size, batch_size), 1.0) for first in cuts[rank::size]]
    return mine or [(0, min(microbatch_size, batch_size), 0.0)]


class Batches:
    """This process's part of every batch, one batch read ahead in a thread.

    Args:
        loader: the images by run position.
        num_classes: classes of the dataset, which is also the null label; 0 for none.
        training_times: from uniform variates to the times to train at, as `diffusion.training_times` makes it.
    """

    def __init__(
        self,
        loader: Loader,
        config: TrainingConfig,
        world: World,
        num_classes: int,
        training_times: Callable[[Tensor], Tensor],
    ) -> None:
        self.config, self.device = config, world.device
        self._loader, self._num_classes, self._training_times = loader, num_classes, training_times
        self._mine = deal(config.batch_size, config.microbatch_size, world.rank, world.size)
        self.count = len(self._mine)
        self._offsets = np.concatenate([np.arange(first, last) for first, last, _ in self._mine])
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._ahead: tuple[int, Future[Batch]] | None = None

    def fetch(self, images_seen: int) -> Batch:
        """The images of this process for the batch that begins at run position `images_seen`; then reads on."""
        if self._ahead is None or self._ahead[0] != images_seen:
            self._ahead = (images_seen, self._reader.submit(self._read, images_seen))
        batch = self._ahead[1].result()
        following = images_seen + self.config.batch_size
        self._ahead = (following, self._reader.submit(self._read, following))
        return batch

    def microbatches(self, images_seen: int, batch: Batch) -> Iterator[Microbatch]:
        """The passes of this process, made from what `fetch(images_seen)` gave."""
        seed, at = self.config.seed, 0
        for first, last, weight in self._mine:
            rows = slice(at, at := at + last - first)
            positions = torch.arange(images_seen + first, images_seen + last, device=self.device)
            x0 = images_to_network(batch.images[rows], self.device)
            noise = keyed_normal(seed, "train.noise", positions, x0.shape[1:], self.device)
            t = self._training_times(keyed_uniform(seed, "train.timestep", positions, device=self.device))
            label = None if batch.labels is None else self._labels(batch.labels[rows], positions)
            yield Microbatch(self._arranged(x0), self._arranged(noise), t, label, images_seen + first, weight)

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._loader.close()

    def _read(self, images_seen: int) -> Batch:
        positions = images_seen + self._offsets
        batch = self._loader.take(positions)
        if self.config.horizontal_flip:
            mirrored = (keyed_uniform(self.config.seed, "train.flip", positions) < 0.5).numpy()
            batch.images[mirrored] = batch.images[mirrored, :, ::-1]
        return batch

    def _labels(self, labels: np.ndarray, positions: Tensor) -> Tensor:
        label = torch.from_numpy(labels).to(self.device)
        if not self.config.label_dropout:
            return label
        dropped = keyed_uniform(self.config.seed, "train.label_dropout", positions, device=self.device)
        return torch.where(dropped < self.config.label_dropout, self._num_classes, label)

    def _arranged(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return images.contiguous(memory_format=layout)
