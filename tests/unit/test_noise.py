"""Keyed randomness: published vectors, distribution, and independence of everything but the address."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_core.diffusion import KeyedNoise, keyed_integers, keyed_normal, keyed_permutation, keyed_uniform
from diffusion_core.diffusion.noise import philox

quick = settings(max_examples=30, deadline=None)
SEEDS = st.integers(-(2**40), 2**70)

GOLDEN_NORMAL = [
    [-0.04708309471607208, -1.6549639701843262, 0.260549932718277],
    [-0.558192789554596, 1.053916573524475, -1.9467136859893799],
]
GOLDEN_INTEGERS = [687, 711, 745, 860]
GOLDEN_PERMUTATION = [5, 4, 2, 0, 6, 1, 7, 3]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    words = philox(tuple(torch.tensor(word) for word in counter), key)  # type: ignore[arg-type]
    assert tuple(int(word) for word in words) == expected


def test_normal_variates_are_normal() -> None:
    z = keyed_normal(3, "test", torch.arange(400), (1000,)).double()
    n = z.numel()
    assert abs(float(z.mean())) < 5 / math.sqrt(n)
    assert float(z.var()) == pytest.approx(1, abs=5 * math.sqrt(2 / n))
    assert float((z**4).mean()) == pytest.approx(3, abs=5 * math.sqrt(96 / n))
    ordered = z.flatten().sort().values
    distance = (torch.special.ndtr(ordered) - torch.arange(n) / n).abs().max()  # Kolmogorov-Smirnov
    assert float(distance) < 1.95 / math.sqrt(n)


def test_neighbouring_addresses_are_uncorrelated() -> None:
    def flat(seed: int = 0, purpose: str = "a", first: int = 0, step: int = 0, draw: int = 0) -> torch.Tensor:
        noise = KeyedNoise(seed, torch.arange(first, first + 100), purpose)
        return noise.normal((1000,), step, draw).double().flatten()

    base = flat()
    for other in (
        flat(seed=1),
        flat(purpose="b"),
        flat(first=1),
        flat(first=2**32),
        flat(step=1),
        flat(draw=1),
        KeyedNoise(0, torch.arange(100), "a").initial((1000,)).double().flatten(),
        base.roll(1),
        base.roll(2),
    ):
        assert abs(float((base * other).mean())) < 5 / math.sqrt(len(base))


@quick
@given(seed=SEEDS, n=st.integers(1, 9), cut=st.integers(0, 9), count=st.integers(1, 13))
def test_a_value_depends_on_its_address_only(seed: int, n: int, cut: int, count: int) -> None:
    positions = torch.arange(n) * 7919 + 5
    whole = keyed_normal(seed, "p", positions, (count,))
    cut = min(cut, n)
    split = torch.cat([keyed_normal(seed, "p", part, (count,)) for part in (positions[:cut], positions[cut:])])
    assert torch.equal(whole, split)
    assert torch.equal(keyed_normal(seed, "p", positions.flip(0), (count,)), whole.flip(0))
    # A smaller image has the first elements of a larger one; the shape only arranges them.
    assert torch.equal(keyed_normal(seed, "p", positions, (count + 3,))[:, :count], whole)
    assert torch.equal(keyed_normal(seed, "p", positions, (1, count, 1)).flatten(1), whole)
    assert torch.equal(
        keyed_uniform(seed, "p", positions, (count,))[:cut], keyed_uniform(seed, "p", positions[:cut], (count,))
    )


@quick
@given(seed=SEEDS, ids=st.lists(st.integers(0, 2**62), min_size=1, max_size=6, unique=True))
def test_noise_of_an_image_does_not_depend_on_its_batch(seed: int, ids: list[int]) -> None:
    together = KeyedNoise(seed, ids).normal((2, 3, 3), 4, draw=1)
    alone = torch.cat([KeyedNoise(seed, [i]).normal((2, 3, 3), 4, draw=1) for i in ids])
    assert torch.equal(together, alone)
    assert len(KeyedNoise(seed, ids)) == len(ids)


def test_positions_may_be_lists_arrays_or_tensors() -> None:
    a = keyed_uniform(0, "p", [3, 4])
    assert torch.equal(a, keyed_uniform(0, "p", np.array([3, 4])))
    assert torch.equal(a, keyed_uniform(0, "p", torch.tensor([3, 4], dtype=torch.int32)))
    assert a.shape == (2,)
    assert keyed_normal(0, "p", [], (2, 2)).shape == (0, 2, 2)


def test_dtype_only_rounds() -> None:
    wide = keyed_normal(0, "p", [1], (64,), dtype=torch.float64)
    assert torch.equal(keyed_normal(0, "p", [1], (64,), dtype=torch.bfloat16), wide.bfloat16())
    assert torch.equal(keyed_normal(0, "p", [1], (64,)), wide.float())


def test_known_values_stay_what_they_are() -> None:
    """Stored models and image sets rely on these numbers: a change here makes every one of them unreproducible."""
    got = KeyedNoise(0, [0, 1]).normal((3,), 2)
    expected = torch.tensor(GOLDEN_NORMAL)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    assert keyed_integers(0, "timestep", [0, 1, 2, 3], 1000).tolist() == GOLDEN_INTEGERS
    assert keyed_permutation(0, "order", 8).tolist() == GOLDEN_PERMUTATION


def test_uniform_is_uniform_and_below_one() -> None:
    u = keyed_uniform(1, "u", torch.arange(100_000))
    assert u.dtype == torch.float64
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    counts = torch.bincount((u * 20).long(), minlength=20).double()
    assert float(((counts - 5000) ** 2 / 5000).sum()) < 50  # chi-square, 19 degrees of freedom


@quick
@given(seed=SEEDS, high=st.integers(1, 2**53))
def test_integers_are_in_range(seed: int, high: int) -> None:
    got = keyed_integers(seed, "i", torch.arange(50), high)
    assert got.dtype == torch.int64
    assert int(got.min()) >= 0
    assert int(got.max()) < high


def test_integers_are_uniform() -> None:
    counts = torch.bincount(keyed_integers(0, "t", torch.arange(100_000), 10), minlength=10).double()
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 32  # 9 degrees of freedom
    with pytest.raises(ValueError, match="high"):
        keyed_integers(0, "t", [0], 0)


@quick
@given(seed=SEEDS, n=st.integers(0, 300))
def test_a_permutation_has_every_element_once(seed: int, n: int) -> None:
    order = keyed_permutation(seed, "order", n)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))


def test_permutations_differ_by_seed_and_purpose_and_mix() -> None:
    a = keyed_permutation(0, "order", 1000)
    assert (a == keyed_permutation(0, "order", 1000)).all()
    assert (a != keyed_permutation(1, "order", 1000)).mean() > 0.98
    assert (a != keyed_permutation(0, "other", 1000)).mean() > 0.98
    assert abs(np.corrcoef(a, np.arange(1000))[0, 1]) < 0.15


@pytest.mark.parametrize(("step", "draw"), [(-1, 0), (2**24, 0), (0, 256), (0, -1)])
def test_steps_and_draws_out_of_range_are_refused(step: int, draw: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        KeyedNoise(0, [0]).normal((1,), step, draw)
