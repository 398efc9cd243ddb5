"""A network that learns: weights, optimizer and moving average of one process, and the optimizer step."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffusion_core.config import UserError
from diffusion_core.diffusion import Objective, keyed_integers, make_process
from diffusion_core.networks import NoisyClassifierConfig, build_network
from diffusion_core.training.batches import Microbatch
from diffusion_core.training.checkpoint import Tensors
from diffusion_core.training.config import Precision
from diffusion_core.training.ema import averages
from diffusion_core.training.run import TrainSpec
from diffusion_core.training.world import World

logger = logging.getLogger(__name__)

Shape = tuple[int, int, int]
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Learner:
    """One process's copy of everything that an optimizer step changes.

    Args:
        spec: network, process, objective and optimizer.
        image_shape: (H, W, C) of the images.
        num_classes: classes of the dataset, 0 for none.
        world: the processes that learn together; all hold the same weights, the leader alone the moving average.
        parts: what `state` gave, on the leader of a run that continues.
        images_seen: how far that run is; 0 for a new one.
        start: URI of a bundle whose weights a new run starts from.
    """

    def __init__(
        self,
        spec: TrainSpec,
        image_shape: Shape,
        num_classes: int,
        world: World,
        parts: dict[str, Tensors] | None = None,
        images_seen: int = 0,
        start: str | None = None,
    ) -> None:
        self.config, self.world = spec.training, world
        self.process = make_process(spec.process)
        torch.manual_seed(self.config.seed)
        self.objective = Objective(self.process, self.config.objective)
        outputs = spec.process.output_channels(image_shape[2])
        network = build_network(spec.network, image_shape, num_classes, outputs)
        if start is not None and world.leads and not images_seen:
            take_weights(network, start)
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        self.network: nn.Module = network.to(device=world.device, memory_format=layout)  # type: ignore[call-overload]
        self.averages = averages(self.network, self.config) if world.leads else {}
        self.ema = self.averages.get("ema")
        if parts is not None:
            self.network.load_state_dict(parts["network"])
            for name, average in self.averages.items():
                average.network.load_state_dict(parts[name])
        self._parameters = dict(self.network.named_parameters())
        self.optimizer = self._make_optimizer(parts, images_seen)
        self._classifies = isinstance(spec.network, NoisyClassifierConfig)
        self._drops = spec.network.dropout > 0
        if self.config.compile:
            self.network.compile(dynamic=False)
        self._model = self._distributed(image_shape, num_classes) if world.size > 1 else self.network

    def learning_rate(self, images_seen: int) -> float:
        """The rate of the step that brings the count to `images_seen`: linear warm-up, then constant."""
        warmup = self.config.warmup_images
        return self.config.learning_rate * (min(images_seen / warmup, 1.0) if warmup else 1.0)

    def step(self, images_seen: int, microbatches: Iterable[Microbatch], count: int) -> tuple[Tensor, Tensor]:
        """One optimizer step on this process's `count` microbatches of the batch.

        Args:
            images_seen: the count that the step leads to.

        Returns:
            This process's share of the batch's mean loss (the shares add up to it) and the norm of the whole gradient
            before clipping, both float32 scalars on the training device; nothing waits for that device.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.world.device)
        try:
            for index, microbatch in enumerate(microbatches, 1):
                loss += self._accumulate(microbatch, exchange=index == count)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"training.microbatch_size: {self.config.microbatch_size} images of this size do not fit in the memory"
                " of the device: use smaller microbatches."
            ) from error
        norm = self._clip()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(images_seen)
        self.optimizer.step()
        for average in self.averages.values():
            average.update(images_seen)
        return loss, norm

    def state(self) -> dict[str, Tensors]:
        """Network, moving averages and optimizer moments, by name; of the leader. The step count follows from the
        images seen, so it is not part of it."""
        moments = {
            f"{name}/{moment}": self.optimizer.state[parameter][moment]
            for name, parameter in self._parameters.items()
            for moment in _MOMENTS
        }
        return {"network": self.network.state_dict(), **self.averaged(), "optimizer": moments}

    def averaged(self) -> dict[str, Tensors]:
        """The moving averages by name; of the leader."""
        return {name: average.network.state_dict() for name, average in self.averages.items()}

    def _accumulate(self, microbatch: Microbatch, exchange: bool) -> Tensor:
        """Add the gradients of one microbatch; with `exchange`, average what was accumulated over the processes."""
        if self._drops:
            torch.manual_seed(int(keyed_integers(self.config.seed, "train.dropout", [microbatch.first], 2**53)))
        share = microbatch.weight / self.config.batch_size
        with nullcontext() if exchange or self.world.size == 1 else self._model.no_sync():
            losses = self._losses(microbatch)
            # Processes are averaged over, while the batch's mean is the sum of their shares.
            (losses.sum() * (share * self.world.size)).backward()
        return losses.detach().sum() * share

    def _losses(self, microbatch: Microbatch) -> Tensor:
        cond = {} if microbatch.label is None else {"label": microbatch.label}
        halved = self.config.precision is Precision.BFLOAT16
        images = microbatch.x0, microbatch.t, microbatch.noise
        with torch.autocast(self.world.device.type, torch.bfloat16) if halved else nullcontext():
            if self._classifies:
                return self.process.classification_losses(self._model, *images, **cond)
            return self.objective(self._model, *images, **cond)

    @torch.no_grad()
    def _clip(self) -> Tensor:
        """Scale the gradients down to the greatest norm allowed; returns their norm before."""
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self.config.grad_clip is not None:
            torch._foreach_mul_(gradients, torch.clamp(self.config.grad_clip / (norm + 1e-6), max=1.0))
        return norm

    def _make_optimizer(self, parts: dict[str, Tensors] | None, images_seen: int) -> torch.optim.AdamW:
        optimizer = torch.optim.AdamW(
            self._parameters.values(),
            lr=self.config.learning_rate,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
            fused=True,
        )
        if images_seen:
            state: dict[int, Any] = {}
            for index, (name, parameter) in enumerate(self._parameters.items()):
                state[index] = {"step": torch.tensor(float(images_seen // self.config.batch_size))}
                for moment in _MOMENTS:
                    # The fused step walks through memory: the moments must lie there as the weights do.
                    tensor = torch.zeros_like(parameter, requires_grad=False)
                    if parts is not None:
                        tensor.copy_(parts["optimizer"][f"{name}/{moment}"])
                    self.world.share([tensor])
                    state[index][moment] = tensor
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return optimizer

    def _distributed(self, image_shape: Shape, num_classes: int) -> DistributedDataParallel:
        device = self.world.device
        with warnings.catch_warnings():
            # The newer name of broadcast_buffers is unknown to torch 2.11.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            model = DistributedDataParallel(
                self.network,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        self._model = model
        self._settle_buckets(image_shape, num_classes)
        return model

    def _settle_buckets(self, image_shape: Shape, num_classes: int) -> None:
        """Two passes whose gradients are thrown away.

        DDP lays its buckets out anew after the first pass, and the order in which gloo adds depends on the layout:
        a run that continues must add in the same order as one that never stopped.
        """
        height, width, channels = image_shape
        size = self.config.microbatch_size
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        x0 = torch.zeros(size, channels, height, width, device=self.world.device).contiguous(memory_format=layout)
        t = self.process.schedule.training_times(torch.zeros(size, dtype=torch.float64, device=self.world.device))
        label = torch.zeros(size, dtype=torch.int64, device=self.world.device) if num_classes else None
        for _ in range(2):
            microbatch = Microbatch(x0, x0, t, label, 0, 0.0)
            self._accumulate(microbatch, exchange=True)
            self.optimizer.zero_grad(set_to_none=True)


def take_weights(network: nn.Module, uri: str) -> None:
    """Load the weights of a bundle. Those that depend on the classes stay fresh when the classes are others.

    Raises:
        UserError: `uri` is no bundle, or nothing of it fits.
    """
    from diffusion_core.bundle import load_bundle

    theirs, ours = load_bundle(uri).network.state_dict(), network.state_dict()
    fitting = {name: tensor for name, tensor in theirs.items() if name in ours and tensor.shape == ours[name].shape}
    fresh = sorted(set(ours) - set(fitting))
    if len(fresh) > len(ours) // 2:
        raise UserError(f"training.init_from: the weights of {uri} do not fit this network.")
    if fresh:
        logger.warning("Not taken from %s, as the classes differ: %s.", uri, ", ".join(fresh))
    network.load_state_dict(fitting, strict=False)
