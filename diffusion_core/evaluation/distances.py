"""Distances between two sets of images, from their features: Fréchet, kernel (KID), precision and recall.

Numpy alone, in float64, on arrays of features (N, d). The real images are always the first argument.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
_BLOCK = 1024  # rows of one block of a distance matrix: bounds the memory at about 8 * 1024 * N bytes


@dataclass(frozen=True)
class GaussianStatistics:
    """Mean (d,) and covariance (d, d) of features, float64, and the number of images they were taken over."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    count: int

    @classmethod
    def of(cls, features: Array) -> GaussianStatistics:
        """Statistics of features (N, d), N ≥ 2. The covariance is the unbiased one, divided by N − 1."""
        count, length = features.shape
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 images, and there are {count}")
        mean = np.zeros(length)
        for block in _blocks(features):
            mean += block.sum(axis=0)
        mean /= count
        covariance = np.zeros((length, length))
        for block in _blocks(features):
            centred = block - mean
            covariance += centred.T @ centred
        return cls(mean, covariance / (count - 1), count)


def frechet_distance(real: GaussianStatistics, generated: GaussianStatistics) -> float:
    """Squared Fréchet distance between two Gaussians (Dowson & Landau 1982; Heusel et al. 2017, equation 6):

        |μ₁ − μ₂|² + Tr Σ₁ + Tr Σ₂ − 2 Tr (Σ₁^½ Σ₂ Σ₁^½)^½

    The matrix under the last root is symmetric and positive semidefinite, so its eigenvalues are real and well
    conditioned, which those of Σ₁Σ₂ are not: no complex residue, no added ε, and singular covariances are fine.
    """
    root = symmetric_root(real.covariance)
    eigenvalues = np.linalg.eigvalsh(_symmetric(root @ generated.covariance @ root))
    overlap = float(np.sqrt(np.maximum(eigenvalues, 0)).sum())
    return _assemble(real, generated.mean, float(np.trace(generated.covariance)), overlap)


def symmetric_root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The positive semidefinite square root of a positive semidefinite matrix (d, d)."""
    eigenvalues, vectors = np.linalg.eigh(_symmetric(matrix))
    return np.asarray((vectors * np.sqrt(np.maximum(eigenvalues, 0))) @ vectors.T)


def paired_bootstrap(
    real: GaussianStatistics, first: Array, second: Array, resamples: int, seed: int
) -> NDArray[np.float64]:
    """Bootstrap distribution of the difference in Fréchet distance, that of `first` minus that of `second`.

    Row i of both is the image of the same id (same label, same noise): a resample draws ids, the same for both, so
    what the two have in common cancels. The reference is held fixed. Negative: `first` is closer to the real images.

    Args:
        first, second: features (N, d) of the images of two models.
        resamples: number of resamples.
        seed: seed of the drawn ids.

    Returns:
        Differences (resamples,) float64.
    """
    if first.shape != second.shape:
        raise ValueError(f"paired features need one shape, and there are {first.shape} and {second.shape}")
    root = symmetric_root(real.covariance)
    ids = np.random.default_rng(seed).integers(len(first), size=(resamples, len(first)))
    features = [np.asarray(each, dtype=np.float64) for each in (first, second)]
    differences = [_resampled(real, root, features[0][row]) - _resampled(real, root, features[1][row]) for row in ids]
    return np.array(differences)


def _resampled(real: GaussianStatistics, root: NDArray[np.float64], features: NDArray[np.float64]) -> float:
    """The Fréchet distance of some features; the eigenvalues are taken from the smaller of the two Gram matrices."""
    mean = features.mean(axis=0)
    centred = (features - mean) / np.sqrt(len(features) - 1)
    product = centred @ root
    gram = product.T @ product if product.shape[0] >= product.shape[1] else product @ product.T
    overlap = float(np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0)).sum())
    return _assemble(real, mean, float(np.square(centred).sum()), overlap)


def _assemble(real: GaussianStatistics, mean: NDArray[np.float64], trace: float, overlap: float) -> float:
    distance = float(np.square(real.mean - mean).sum()) + float(np.trace(real.covariance)) + trace - 2 * overlap
    return max(distance, 0.0)  # below zero by rounding only


def kernel_distance(real: Array, generated: Array, subsets: int, subset_size: int, seed: int) -> tuple[float, float]:
    """Squared maximum mean discrepancy, kernel (x·y/d + 1)³ (Bińkowski et al. 2018): estimate and standard error.

    Unbiased, so it can be negative. The mean over `subsets` random subsets, each of `subset_size` images of both sets
    but at most half of the smaller one, which makes the subsets a delete-d jackknife (Shao & Wu 1989): with m of n
    images in a subset the variance of the estimate is m/(n − m) times the variance over the subsets.
    (Of two sets of the same distribution the estimate varies less than that: there the error is an upper bound.)

    Raises:
        ValueError: a set has fewer than 4 images.
    """
    smaller = min(len(real), len(generated))
    size = min(subset_size, smaller // 2)
    if size < 2:
        raise ValueError(f"the kernel distance needs at least 4 images, and there are {smaller}")
    draw = np.random.default_rng(seed)
    estimates = np.array(
        [
            _unbiased_mmd(
                np.asarray(real[draw.choice(len(real), size, replace=False)], dtype=np.float64),
                np.asarray(generated[draw.choice(len(generated), size, replace=False)], dtype=np.float64),
            )
            for _ in range(subsets)
        ]
    )
    error = float(estimates.std(ddof=1)) * np.sqrt(size / (smaller - size))
    return float(estimates.mean()), float(error)


def _unbiased_mmd(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The U-statistic of Gretton et al. 2012, equation 3, of two sets (m, d)."""
    count, length = x.shape

    def kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray((a @ b.T / length + 1) ** 3)

    def mean_of_pairs(a: NDArray[np.float64]) -> float:
        gram = kernel(a, a)
        return float(gram.sum() - np.trace(gram)) / (count * (count - 1))

    return mean_of_pairs(x) + mean_of_pairs(y) - 2 * float(kernel(x, y).mean())


def precision_recall(real: Array, generated: Array, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, equations 1 and 2).

    The manifold of a set is the union of balls around its points, each reaching to the point's k-th nearest neighbour
    in the set. Precision: share of generated points in the real manifold. Recall: share of real points in the
    generated manifold. Both sets should have the same size, because larger sets have smaller balls.

    Raises:
        ValueError: a set has no k-th neighbours.
    """
    if min(len(real), len(generated)) <= neighbours:
        raise ValueError(f"{neighbours} neighbours need more than {min(len(real), len(generated))} images")
    precision = _share_inside(real, _radii(real, neighbours), generated)
    return precision, _share_inside(generated, _radii(generated, neighbours), real)


def _radii(points: Array, neighbours: int) -> NDArray[np.float64]:
    """Squared distance of each point (N, d) to its k-th nearest neighbour; a point is not its own neighbour."""
    radii = np.empty(len(points))
    for start in range(0, len(points), _BLOCK):
        distances = _squared_distances(points[start : start + _BLOCK], points)
        rows = np.arange(len(distances))
        distances[rows, start + rows] = np.inf
        radii[start : start + len(rows)] = np.partition(distances, neighbours - 1, axis=1)[:, neighbours - 1]
    return radii


def _share_inside(centres: Array, radii: NDArray[np.float64], points: Array) -> float:
    inside = 0
    for start in range(0, len(points), _BLOCK):
        distances = _squared_distances(points[start : start + _BLOCK], centres)
        inside += int((distances <= radii).any(axis=1).sum())
    return inside / len(points)


def _squared_distances(a: Array, b: Array) -> NDArray[np.float64]:
    """Squared Euclidean distances (n, m) of points (n, d) and (m, d). Equal points have a distance of exactly 0."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    squares = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1)[None, :]
    distances = squares - 2 * (a @ b.T)
    distances[distances < 1e-12 * squares] = 0  # cancellation leaves nothing but rounding there
    return np.asarray(distances)


def _symmetric(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((matrix + matrix.T) / 2)


def _blocks(features: Array) -> Iterator[NDArray[np.float64]]:
    for start in range(0, len(features), _BLOCK):
        yield np.asarray(features[start : start + _BLOCK], dtype=np.float64)
