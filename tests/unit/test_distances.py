"""Fréchet distance, kernel distance, precision and recall, against closed forms and slow references."""

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance

from diffusion_core.evaluation import distances
from diffusion_core.evaluation.distances import (
    GaussianStatistics,
    frechet_distance,
    kernel_distance,
    paired_bootstrap,
    precision_recall,
)


def gaussian(mean, covariance):
    return GaussianStatistics(np.asarray(mean, float), np.asarray(covariance, float), 1000)


def random_covariance(rng, size, rank=None):
    factor = rng.normal(size=(size, rank or size))
    return factor @ factor.T / size


def test_statistics_are_those_of_numpy_with_n_minus_one():
    features = np.random.default_rng(0).normal(3, 2, size=(2500, 7)).astype(np.float32)
    found = GaussianStatistics.of(features)
    np.testing.assert_allclose(found.mean, features.astype(float).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features.astype(float), rowvar=False, ddof=1), rtol=1e-10)
    tiny = GaussianStatistics.of(np.array([[0.0], [2.0]]))
    assert tiny.covariance[0, 0] == 2.0 and tiny.count == 2


def test_statistics_keep_small_variances_on_a_large_mean():
    values = 1e6 + np.random.default_rng(0).normal(size=(3000, 2)) * 1e-2
    found = GaussianStatistics.of(values)
    np.testing.assert_allclose(np.diag(found.covariance), np.full(2, 1e-4), rtol=0.1)


def test_statistics_need_two_images():
    with pytest.raises(ValueError, match="at least 2"):
        GaussianStatistics.of(np.zeros((1, 3)))


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form():
    first = gaussian([0, 1, 2], np.diag([1.0, 4.0, 9.0]))
    second = gaussian([1, 1, 0], np.diag([4.0, 4.0, 1.0]))
    expected = (1 + 0 + 4) + (1 - 2) ** 2 + 0 + (3 - 1) ** 2
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [2, 16, 64])
def test_frechet_distance_agrees_with_the_matrix_square_root(size):
    rng = np.random.default_rng(size)
    a, b = random_covariance(rng, size), random_covariance(rng, size)
    mean_a, mean_b = rng.normal(size=size), rng.normal(size=size)
    root = scipy.linalg.sqrtm(a @ b)
    expected = np.sum((mean_a - mean_b) ** 2) + np.trace(a + b - 2 * root.real)
    assert frechet_distance(gaussian(mean_a, a), gaussian(mean_b, b)) == pytest.approx(expected, rel=1e-7)


def test_frechet_distance_is_symmetric_zero_to_itself_and_stable_for_singular_covariances():
    rng = np.random.default_rng(1)
    full, flat = random_covariance(rng, 32), random_covariance(rng, 32, rank=5)
    first, second = gaussian(np.zeros(32), full), gaussian(np.ones(32), flat)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-6)
    assert frechet_distance(second, second) == pytest.approx(0, abs=1e-5)
    assert np.isfinite(frechet_distance(gaussian(np.zeros(32), np.zeros((32, 32))), second))


def test_frechet_distance_of_samples_approaches_that_of_their_gaussians():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(20000, 4)), rng.normal(0.5, 2, size=(20000, 4))
    found = frechet_distance(GaussianStatistics.of(x), GaussianStatistics.of(y))
    assert found == pytest.approx(4 * (0.25 + 1), rel=0.05)


@pytest.mark.parametrize("count", [40, 400])
def test_the_bootstrap_computes_the_same_distance_as_the_plain_form(count):
    rng = np.random.default_rng(count)
    real = GaussianStatistics.of(rng.normal(size=(500, 64)))
    features = rng.normal(0.3, 1.2, size=(count, 64))
    plain = frechet_distance(real, GaussianStatistics.of(features))
    resampled = distances._resampled(real, distances.symmetric_root(real.covariance), features)
    assert resampled == pytest.approx(plain, rel=1e-6)


def test_the_paired_bootstrap_sees_small_differences_and_no_difference():
    rng = np.random.default_rng(3)
    real = GaussianStatistics.of(rng.normal(size=(4000, 8)))
    good = rng.normal(size=(400, 8)) + 0.2
    worse = good + 0.05
    better = paired_bootstrap(real, good, worse, 200, seed=0)
    assert np.quantile(better, 0.975) < 0
    assert np.quantile(paired_bootstrap(real, worse, good, 200, seed=0), 0.025) > 0
    assert not paired_bootstrap(real, good, good, 50, seed=0).any()
    unpaired = rng.normal(size=(400, 8)) + 0.2
    noise = paired_bootstrap(real, good, unpaired, 200, seed=0)
    assert np.quantile(noise, 0.025) < 0 < np.quantile(noise, 0.975)
    np.testing.assert_array_equal(better, paired_bootstrap(real, good, worse, 200, seed=0))


def test_kernel_distance_agrees_with_the_definition_written_out():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(6, 3))
    k = lambda a, b: (a @ b / 3 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    expected = (
        sum(k(x[i], x[j]) for i, j in pairs) / 30
        + sum(k(y[i], y[j]) for i, j in pairs) / 30
        - 2 * sum(k(a, b) for a in x for b in y) / 36
    )
    assert distances._unbiased_mmd(x, y) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_kernel_distance_is_unbiased_and_its_standard_error_is_honest(shift):
    rng = np.random.default_rng(5)
    runs = [
        kernel_distance(rng.normal(size=(60, 4)), rng.normal(shift, 1, size=(60, 4)), 40, 1000, seed=i)
        for i in range(120)
    ]
    estimates, errors = np.array(runs).T
    large = [rng.normal(size=(3000, 4)), rng.normal(shift, 1, size=(3000, 4))]
    truth = distances._unbiased_mmd(*large) if shift else 0.0
    assert estimates.mean() == pytest.approx(truth, abs=4 * estimates.std() / np.sqrt(len(estimates)))
    if shift:
        assert errors.mean() == pytest.approx(estimates.std(), rel=0.35)
    else:  # the estimate is degenerate there: the error is an upper bound
        assert estimates.std() < errors.mean() < 2 * estimates.std()
        assert (estimates < 0).any()


def test_kernel_distance_grows_with_the_distance():
    rng = np.random.default_rng(6)
    real = rng.normal(size=(300, 4))
    far = [kernel_distance(real, rng.normal(shift, 1, size=(300, 4)), 20, 100, 0)[0] for shift in (0.0, 0.5, 1.0)]
    assert far[0] < far[1] < far[2]
    with pytest.raises(ValueError, match="at least 4"):
        kernel_distance(real, real[:3], 2, 10, 0)


def slow_precision_recall(real, generated, k):
    def inside(centres, points):
        among = scipy.spatial.distance.cdist(centres, centres)
        np.fill_diagonal(among, np.inf)
        radii = np.sort(among, axis=1)[:, k - 1]
        return (scipy.spatial.distance.cdist(points, centres) <= radii).any(axis=1).mean()

    return inside(real, generated), inside(generated, real)


@pytest.mark.parametrize("block", [7, 1024])
def test_precision_and_recall_agree_with_a_slow_reference_in_any_block_size(block, monkeypatch):
    monkeypatch.setattr(distances, "_BLOCK", block)
    rng = np.random.default_rng(7)
    real, generated = rng.normal(size=(90, 5)), rng.normal(0.4, 0.6, size=(80, 5))
    assert precision_recall(real, generated, 3) == pytest.approx(slow_precision_recall(real, generated, 3))


def test_a_collapsed_set_has_precision_without_recall_and_a_noisy_one_the_reverse():
    rng = np.random.default_rng(8)
    real = rng.normal(size=(500, 6))
    prototypes = real[:5].repeat(100, axis=0) + rng.normal(scale=1e-3, size=(500, 6))
    precision, recall = precision_recall(real, prototypes, 3)
    assert precision > 0.95 and recall < 0.1
    noisy = rng.normal(scale=3, size=(500, 6))
    precision, recall = precision_recall(real, noisy, 3)
    assert precision < 0.5 and recall > 0.9


def test_points_that_coincide_are_neighbours_at_distance_zero():
    points = np.repeat(np.array([[1e3, 1e3], [2e3, 2e3]]), 10, axis=0)
    assert precision_recall(points, points, 3) == (1.0, 1.0)
    assert precision_recall(points, points + 1.0, 3) == (0.0, 0.0)
    with pytest.raises(ValueError, match="neighbours"):
        precision_recall(points[:3], points, 3)
