"""The two sides of the comparison: one network shape, trained and sampled by this project and by diffusers.

Both get the same number of parameters and attention heads, the same precision, optimizer (fused AdamW), gradient
clipping, moving average, label dropout, and the same settings of torch. Ours is what the training loop and the
generation worker run, keyed noise included; theirs is what diffusers' training example and pipeline run.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from diffusers.utils import logging as diffusers_logging
from torch import nn

from diffusion_core.data import Batch
from diffusion_core.diffusion import make_process
from diffusion_core.diffusion.config import ProcessConfig, SamplerConfig
from diffusion_core.generation.config import GenerationConfig
from diffusion_core.generation.worker import Generator
from diffusion_core.networks import UNetConfig, build_network
from diffusion_core.networks.blocks import group_count
from diffusion_core.training.batches import Batches
from diffusion_core.training.config import TrainingConfig
from diffusion_core.training.learner import Learner
from diffusion_core.training.run import TrainSpec
from diffusion_core.training.world import World

CLASSES = 10
TIMESTEPS = 1000
LABEL_DROPOUT = 0.1
diffusers_logging.set_verbosity_error()

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True)
class Shape:
    """A network and the batches that it is measured with."""

    name: str
    image_shape: tuple[int, int, int]
    network: UNetConfig
    train_batch: int
    sample_batch: int
    steps: int = 50


class Ours:
    """This project: a training step of `Learner` on batches from `Batches`, and images from `Generator`."""

    def __init__(self, shape: Shape, precision: str, device: torch.device, compiled: bool) -> None:
        self.shape, self.device = shape, device
        training = TrainingConfig(
            batch_size=shape.train_batch,
            microbatch_size=shape.train_batch,
            label_dropout=LABEL_DROPOUT,
            precision=precision,
            compile=compiled,
        )
        spec = TrainSpec(dataset_uri="none", network=shape.network, training=training)
        world = World(device=device)
        self.learner = Learner(spec, shape.image_shape, CLASSES, world)
        self.batches = Batches(_Images(shape), training, world, CLASSES, self.learner.process.schedule.training_times)  # type: ignore[arg-type]
        self.images_seen = 0
        network = build_network(shape.network, shape.image_shape, CLASSES).to(device).eval().requires_grad_(False)
        generation = GenerationConfig(
            sampler=SamplerConfig(kind="ddim", steps=shape.steps, threshold="static"),
            batch_size=shape.sample_batch,
            precision=precision,
            threads=torch.get_num_threads(),
        )
        bundle = SimpleNamespace(
            network=network,
            process=make_process(ProcessConfig(timesteps=TIMESTEPS)),
            config=SimpleNamespace(image_shape=shape.image_shape),
        )
        self.generator = Generator(bundle, generation, device)  # type: ignore[arg-type]
        if compiled:
            self.generator._network.network.compile(dynamic=False)

    @property
    def parameters(self) -> int:
        return sum(each.numel() for each in self.generator.bundle.network.parameters())

    def train_step(self) -> None:
        batch = self.batches.fetch(self.images_seen)
        microbatches = self.batches.microbatches(self.images_seen, batch)
        self.images_seen += self.shape.train_batch
        self.learner.step(self.images_seen, microbatches, self.batches.count)

    def sample(self) -> np.ndarray:
        ids = np.arange(self.shape.sample_batch, dtype=np.int64)
        return self.generator.images(ids, ids % CLASSES)

    def close(self) -> None:
        self.batches.close()


class Peer:
    """diffusers: the step of its unconditional training example with labels, and the loop of its DDIM pipeline.

    In bfloat16 the example trains under autocast and a pipeline samples with weights in bfloat16. Of the two memory
    layouts it gets the one that is faster for it (`layout`).
    """

    def __init__(self, shape: Shape, precision: str, device: torch.device, compiled: bool) -> None:
        self.shape, self.device, self.halved = shape, device, precision == "bfloat16"
        self.layout = "channels_last"
        self.model = _peer_network(shape).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-4, weight_decay=0.0, fused=True)
        self.ema = EMAModel(self.model.parameters(), decay=0.9999, use_ema_warmup=True, foreach=True)
        self.scheduler = DDPMScheduler(TIMESTEPS, beta_schedule="squaredcos_cap_v2")
        self.sampling_model = _peer_network(shape).to(device).eval().requires_grad_(False)
        if self.halved:
            self.sampling_model.to(torch.bfloat16)
        self.sampler = DDIMScheduler(TIMESTEPS, beta_schedule="squaredcos_cap_v2", clip_sample=True)
        self.images = _Images(shape)
        self.arrange("channels_last")
        if compiled:
            self.model.compile(dynamic=False)
            self.sampling_model.compile(dynamic=False)

    @property
    def parameters(self) -> int:
        return sum(each.numel() for each in self.model.parameters())

    def arrange(self, layout: str) -> None:
        self.layout = layout
        self.model.to(memory_format=LAYOUTS[layout])
        self.sampling_model.to(memory_format=LAYOUTS[layout])

    def train_step(self) -> None:
        batch = self.images.take(np.arange(self.shape.train_batch))
        x0 = torch.from_numpy(batch.images).to(self.device).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
        x0 = x0.contiguous(memory_format=LAYOUTS[self.layout])
        labels = torch.from_numpy(batch.labels).to(self.device)
        labels = torch.where(torch.rand(len(labels), device=self.device) < LABEL_DROPOUT, CLASSES, labels)
        noise = torch.randn_like(x0)
        t = torch.randint(0, TIMESTEPS, (len(x0),), device=self.device)
        with self._cast():
            output = self.model(self.scheduler.add_noise(x0, noise, t), t, class_labels=labels).sample
        loss = nn.functional.mse_loss(output.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.ema.step(self.model.parameters())
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def sample(self, steps: int | None = None) -> np.ndarray:
        height, width, channels = self.shape.image_shape
        dtype = torch.bfloat16 if self.halved else torch.float32
        x = torch.randn(self.shape.sample_batch, channels, height, width, device=self.device, dtype=dtype)
        x = x.contiguous(memory_format=LAYOUTS[self.layout])
        labels = torch.arange(len(x), device=self.device) % CLASSES
        self.sampler.set_timesteps(steps or self.shape.steps)
        for t in self.sampler.timesteps:
            x = self.sampler.step(self.sampling_model(x, t, class_labels=labels).sample, t, x, eta=0.0).prev_sample
        images = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
        return (images * 255).round().astype(np.uint8)

    def close(self) -> None:
        return

    def _cast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.halved else nullcontext()


def _peer_network(shape: Shape) -> UNet2DModel:
    """diffusers' network of the same blocks, widths, attention places and heads."""
    network, (height, width, channels) = shape.network, shape.image_shape
    levels = range(len(network.channel_multipliers))
    attended = [min(height, width) // 2**level in network.attention_resolutions for level in levels]
    widths = [network.base_channels * multiplier for multiplier in network.channel_multipliers]
    groups = group_count(network.base_channels)
    return UNet2DModel(
        sample_size=(height, width),
        in_channels=channels,
        out_channels=channels,
        freq_shift=0,
        down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attended),
        up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attended)),
        block_out_channels=tuple(widths),
        layers_per_block=network.blocks_per_level,
        dropout=network.dropout,
        attention_head_dim=network.head_channels,
        norm_num_groups=groups,
        attn_norm_num_groups=groups,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=CLASSES + 1,
    )


class _Images:
    """Random images in memory, as a loader gives them."""

    def __init__(self, shape: Shape) -> None:
        generator = np.random.default_rng(0)
        self.images = generator.integers(0, 256, (1024, *shape.image_shape), dtype=np.uint8)
        self.labels = generator.integers(0, CLASSES, 1024)

    def take(self, positions: np.ndarray) -> Batch:
        rows = positions % len(self.images)
        return Batch(self.images[rows], self.labels[rows], None, [])

    def close(self) -> None:
        return
