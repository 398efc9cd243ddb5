"""Randomness with an address: every value is a function of (seed, purpose, position, element) and of nothing else.

The generator is counter-based: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"),
whose state is its argument. The key is a digest of the seed and of the purpose, the counter is (element block, draw,
position), so that no value depends on a batch, a rank, a device, or on what was drawn before. Normal variates are
made by Box-Muller in float64, which keeps CPU and GPU together to the last bit of float32 but for rare roundings.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

Positions = Tensor | np.ndarray | Sequence[int]
Device = torch.device | str | None

_WORD = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_DRAWS = 256
_STEPS = 2**24


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random 32-bit words for each counter.

    Args:
        counter: four int64 tensors that broadcast together, each value in [0, 2**32).
        key: two integers in [0, 2**32).

    Returns:
        Four int64 tensors of the broadcast shape, each value in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high_0, low_0 = _multiply(c0, _MULTIPLIER_0)
        high_1, low_1 = _multiply(c2, _MULTIPLIER_1)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    shape = torch.broadcast_shapes(c0.shape, c1.shape, c2.shape, c3.shape)
    return c0.expand(shape), c1.expand(shape), c2.expand(shape), c3.expand(shape)


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit product. `multiplier - 2**32` is used, whose product never overflows int64."""
    product = word * (multiplier - 2**32)
    return ((product >> 32) + word) & _WORD, product & _WORD


@lru_cache(maxsize=256)
def _key(seed: int, purpose: str) -> tuple[int, int]:
    digest = hashlib.sha256(f"{int(seed)}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _words(seed: int, purpose: str, positions: Positions, count: int, draw: int, device: Device) -> Tensor:
    """Random words (N, count) int64 in [0, 2**32); word i of a position does not depend on `count`."""
    where = torch.as_tensor(positions, dtype=torch.int64, device=device).reshape(-1, 1)
    blocks = torch.arange(-(-count // 4), dtype=torch.int64, device=where.device).reshape(1, -1)
    draws = torch.full((1, 1), draw, dtype=torch.int64, device=where.device)
    words = philox((blocks, draws, where & _WORD, (where >> 32) & _WORD), _key(seed, purpose))
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def _normal(
    seed: int,
    purpose: str,
    positions: Positions,
    shape: Sequence[int],
    draw: int,
    device: Device,
    dtype: torch.dtype,
) -> Tensor:
    count = math.prod(shape)
    words = _words(seed, purpose, positions, count + count % 2, draw, device).unflatten(1, (-1, 2))
    # Half a unit is added so that the logarithm never sees 0.
    radius = torch.sqrt(-2.0 * torch.log((words[..., 0].double() + 0.5) * 2.0**-32))
    angle = words[..., 1].double() * (2.0 * math.pi * 2.0**-32)
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(1)[:, :count].to(dtype).reshape(words.shape[0], *shape)


def keyed_normal(
    seed: int,
    purpose: str,
    positions: Positions,
    shape: Sequence[int],
    device: Device = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise (N, *shape), one item for each of the N int64 positions.

    Element e of an item depends on (seed, purpose, position, e) only, e counted in row-major order of `shape`.
    """
    return _normal(seed, purpose, positions, shape, 0, device, dtype)


def keyed_uniform(
    seed: int, purpose: str, positions: Positions, shape: Sequence[int] = (), device: Device = None
) -> Tensor:
    """Uniform variates in [0, 1), float64 with 53 random bits, of shape (N, *shape)."""
    count = math.prod(shape)
    words = _words(seed, purpose, positions, 2 * count, 0, device).unflatten(1, (-1, 2))
    bits = (words[..., 0] << 21) | (words[..., 1] >> 11)
    return (bits.double() * 2.0**-53).reshape(words.shape[0], *shape)


def keyed_integers(seed: int, purpose: str, positions: Positions, high: int, device: Device = None) -> Tensor:
    """Integers (N,) int64 in [0, high), uniform but for a bias below high * 2**-53.

    Raises:
        ValueError: if `high` is not in [1, 2**53].
    """
    if not 1 <= high <= 2**53:
        raise ValueError(f"high is {high}, but must be from 1 to 2**53")
    scaled = keyed_uniform(seed, purpose, positions, device=device) * high
    return scaled.floor().long().clamp_(max=high - 1)


def keyed_permutation(seed: int, purpose: str, n: int) -> np.ndarray:
    """A random permutation of 0 … n-1, int64 (n,): the order of n random 64-bit words (ties keep their order)."""
    words = _words(seed, purpose, torch.arange(n), 2, 0, None).numpy().astype(np.uint64)
    return np.argsort((words[:, 0] << np.uint64(32)) | words[:, 1], kind="stable").astype(np.int64)


class KeyedNoise:
    """The noise of a batch of images that are being sampled: a function of (seed, image id, step, draw).

    Args:
        seed: any integer.
        image_ids: (N,) int64, one for each image of the batch; their order and neighbours do not matter.
        purpose: separates streams of the same seed.
    """

    def __init__(self, seed: int, image_ids: Positions, purpose: str = "sampler") -> None:
        self.seed = seed
        self.purpose = purpose
        self.image_ids = torch.as_tensor(image_ids, dtype=torch.int64).reshape(-1)

    def __len__(self) -> int:
        return len(self.image_ids)

    def normal(
        self,
        shape: Sequence[int],
        step: int,
        draw: int = 0,
        device: Device = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Standard normal noise (N, *shape) of one sampler step; `draw` tells apart several draws within a step.

        Raises:
            ValueError: if `step` is not in [0, 2**24) or `draw` not in [0, 256).
        """
        if not (0 <= step < _STEPS and 0 <= draw < _DRAWS):
            raise ValueError(f"step {step} or draw {draw} is out of range")
        return _normal(self.seed, self.purpose, self.image_ids, shape, step * _DRAWS + draw, device, dtype)

    def initial(self, shape: Sequence[int], device: Device = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The noise (N, *shape) that sampling starts from, of unit variance."""
        return _normal(self.seed, f"{self.purpose}/initial", self.image_ids, shape, 0, device, dtype)
