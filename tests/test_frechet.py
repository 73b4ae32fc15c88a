"""Moments and the Frechet distance against golden numbers, closed forms and independent implementations."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from evaluations import frechet
from evaluations.metrics import Moments, bootstrap_frechet, frechet_distance, mean_covariance


def random_covariance(rng, size, rank=None):
    factor = rng.standard_normal((size, rank or 2 * size))
    return factor @ factor.T / factor.shape[1]


def test_frechet_golden(adm_golden):
    value = frechet_distance(*mean_covariance(adm_golden["ref"]), *mean_covariance(adm_golden["gen"]))
    assert value == pytest.approx(float(adm_golden["frechet"]), rel=1e-6)


def test_frechet_of_commuting_gaussians():
    """Diagonal covariances: |mu1 - mu2|^2 + sum (std1 - std2)^2."""
    mu1, mu2 = np.array([1.0, 0.0, -2.0]), np.array([0.0, 3.0, -2.5])
    std1, std2 = np.array([1.0, 0.5, 2.0]), np.array([3.0, 0.25, 0.0])
    expected = ((mu1 - mu2) ** 2).sum() + ((std1 - std2) ** 2).sum()
    assert frechet_distance(mu1, np.diag(std1**2), mu2, np.diag(std2**2)) == pytest.approx(expected, rel=1e-12)


def test_frechet_agrees_with_sqrtm(rng):
    mu1, mu2 = rng.standard_normal((2, 20))
    sigma1, sigma2 = random_covariance(rng, 20), 3 * random_covariance(rng, 20)
    trace_root = np.trace(scipy.linalg.sqrtm(sigma1 @ sigma2)).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_root
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rank", [1, 5])
def test_frechet_of_singular_covariances(rng, rank):
    """Singular covariances made sqrtm return nan or a complex matrix. c^2 S against S: (c - 1)^2 tr S, whatever the rank."""
    sigma, mu = random_covariance(rng, 200, rank), np.zeros(200)
    assert frechet_distance(mu, 9 * sigma, mu, sigma) == pytest.approx(4 * np.trace(sigma), rel=1e-9)
    assert frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-9 * np.trace(sigma))


def test_frechet_of_singular_covariances_in_orthogonal_subspaces(rng):
    """Nothing overlaps: tr S1 + tr S2."""
    axes = np.linalg.qr(rng.standard_normal((60, 60)))[0]
    sigma1, sigma2 = axes[:, :20] @ axes[:, :20].T, 2 * axes[:, 20:50] @ axes[:, 20:50].T
    assert frechet_distance(np.zeros(60), sigma1, np.zeros(60), sigma2) == pytest.approx(20 + 60, rel=1e-9)


def test_frechet_of_zero_covariances():
    assert frechet_distance(np.zeros(2), np.zeros((2, 2)), np.array([3.0, 4.0]), np.zeros((2, 2))) == 25


def test_frechet_is_symmetric_and_takes_tensors(rng):
    a, b = mean_covariance(rng.standard_normal((50, 8))), mean_covariance(rng.standard_normal((70, 8)) * 2)
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*map(torch.from_numpy, (*b, *a))), rel=1e-10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu2": np.zeros(4)}, r"\(3,\) and \(4,\)"),
        ({"sigma2": np.eye(4)}, r"sigma2 must be \(3, 3\)"),
        ({"sigma1": np.diag([1.0, np.nan, 1.0])}, "sigma1 has a non-finite entry"),
        ({"mu1": np.array([0.0, np.inf, 0.0])}, "mu1 has a non-finite entry"),
        ({"sigma1": np.diag([1.0, -1.0, 1.0])}, "sigma1 is no covariance"),
    ],
)
def test_frechet_bad_input(changes, message):
    good = {"mu1": np.zeros(3), "sigma1": np.eye(3), "mu2": np.zeros(3), "sigma2": np.eye(3)}
    with pytest.raises(ValueError, match=message):
        frechet_distance(**good | changes)


def test_mean_covariance_is_numpys_and_blocked(rng, monkeypatch):
    monkeypatch.setattr(frechet, "BLOCK_ROWS", 7)
    features = rng.standard_normal((100, 6)).astype(np.float32)
    mu, sigma = mean_covariance(features)
    np.testing.assert_allclose(mu, features.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-10, atol=1e-14)


def test_covariance_survives_a_large_mean(rng):
    """E[x^2] - E[x]^2 loses every digit here."""
    deviations = rng.standard_normal((200, 4))
    sigma = mean_covariance(deviations + 1e8)[1]
    np.testing.assert_allclose(sigma, np.cov(deviations, rowvar=False), rtol=1e-6, atol=1e-6)


def test_mean_covariance_bad_input():
    features = np.ones((5, 2), np.float32)
    features[3, 1] = np.nan
    with pytest.raises(ValueError, match="image 3 has a non-finite feature"):
        mean_covariance(features)
    with pytest.raises(ValueError, match="at least two images"):
        mean_covariance(np.ones((1, 2)))


# --- Factors


def spread_covariance(rng, size, smallest):
    """Eigenvalues from 1 down to ``smallest``, in directions of chance."""
    axes = np.linalg.qr(rng.standard_normal((size, size)))[0]
    return (axes * np.geomspace(1, smallest, size)) @ axes.T


@pytest.mark.parametrize("smallest", [1e-1, 1e-4, 1e-9])
def test_frechet_of_ill_conditioned_covariances(rng, smallest):
    """c^2 S against S: (c - 1)^2 tr S, to six digits also where the distance is a millionth of the traces."""
    sigma, mu = spread_covariance(rng, 100, smallest), np.zeros(100)
    for c in (1.001, 2):
        value = frechet_distance(mu, c**2 * sigma, mu, sigma)
        assert value == pytest.approx((c - 1) ** 2 * np.trace(sigma), rel=1e-6)


def test_singular_values_decide_where_eigenvalues_cannot(rng, monkeypatch):
    """Sets that hardly differ: what squaring loses counts. Sets that differ: it does not, and the slow way is not taken."""
    calls, svd = [], np.linalg.svd
    monkeypatch.setattr(np.linalg, "svd", lambda *args, **kwargs: calls.append(1) or svd(*args, **kwargs))
    sigma, mu = spread_covariance(rng, 60, 1e-9), np.zeros(60)
    frechet_distance(mu, sigma, mu, sigma)
    assert len(calls) == 1
    frechet_distance(mu, sigma, mu, spread_covariance(rng, 60, 1e-3))
    assert len(calls) == 1


def test_frechet_of_fewer_images_than_features(rng):
    """Two sets of 30 and 50 images in 200 dimensions: the trace by the images' own products, which are no covariances."""
    x, y = rng.standard_normal((30, 200)), 2 * rng.standard_normal((50, 200)) + 1
    (mu1, sigma1), (mu2, sigma2) = mean_covariance(x), mean_covariance(y)
    trace_root = np.linalg.svd((x - mu1) @ (y - mu2).T, compute_uv=False).sum() / np.sqrt(29 * 49)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_root
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-9)


def test_frechet_with_features_that_are_always_zero(rng):
    """Dead features add nothing."""
    x, y = rng.standard_normal((2, 80, 6))
    dead = np.zeros((80, 3))
    expected = frechet_distance(*mean_covariance(x), *mean_covariance(y))
    padded = (mean_covariance(np.concatenate([dead, features, dead], axis=1)) for features in (x, y))
    assert frechet_distance(*next(padded), *next(padded)) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_statistics_stored_in_float32(rng):
    """A singular covariance rounded to float32 has negative eigenvalues, which are no fault of the user's."""
    sigma, mu = random_covariance(rng, 100, 20), np.zeros(100)
    rounded = sigma.astype(np.float32).astype(np.float64)
    assert np.linalg.eigvalsh(rounded)[0] < 0
    assert frechet_distance(mu, 9 * rounded, mu, sigma) == pytest.approx(4 * np.trace(sigma), rel=1e-3)


@pytest.mark.parametrize("sigma", [-np.eye(3), np.array([[1.0, 2.0], [2.0, 1.0]]), np.array([[0.0, 1.0], [1.0, 0.0]])])
def test_no_covariance_is_reported(sigma):
    mu = np.zeros(len(sigma))
    with pytest.raises(ValueError, match="sigma2 is no covariance: it has the eigenvalue -1"):
        frechet_distance(mu, np.eye(len(sigma)), mu, sigma)


def test_frechet_agrees_with_torch_fidelity(rng):
    x, y = rng.standard_normal((300, 12)), rng.standard_normal((200, 12)) @ rng.standard_normal((12, 12))
    theirs = [fid_features_to_statistics(torch.from_numpy(features)) for features in (x, y)]
    expected = fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(*mean_covariance(x), *mean_covariance(y)) == pytest.approx(expected, rel=1e-9)


# --- Moments


def assert_moments(moments, features):
    mu, sigma = moments.mean_covariance()
    np.testing.assert_allclose(mu, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(features, rowvar=False), rtol=1e-10, atol=1e-12)
    assert moments.count == len(features)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_moments_of_batches(rng, monkeypatch, size):
    monkeypatch.setattr(frechet, "BLOCK_ROWS", 30)
    features = rng.standard_normal((100, 6)) + 10
    moments = Moments()
    for start in range(0, 100, size):
        moments.update(features[start : start + size])
    assert_moments(moments, features)


def test_moments_of_processes(rng):
    """One of them saw nothing; what they exchange is arrays; merging leaves the other as it was."""
    features = rng.standard_normal((90, 4)) * [1, 5, 0.1, 2] + 3
    parts = [Moments().update(features[rows]) for rows in (slice(0, 50), slice(50, 50), slice(50, 51), slice(51, 90))]
    whole = Moments()
    for part in parts:
        state = part.state()
        assert all(isinstance(value, np.ndarray) for value in state.values())
        whole.merge(Moments.from_state(state))
    assert_moments(whole, features)
    assert_moments(parts[0].merge(Moments()), features[:50])
    assert_moments(Moments().merge(parts[0]), features[:50])
    assert_moments(parts[0], features[:50])


def test_moments_survive_a_large_mean_and_batches_that_differ(rng):
    deviations = np.concatenate([rng.standard_normal((100, 3)), rng.standard_normal((100, 3)) + 1000])
    moments = Moments()
    for part in np.split(deviations + 1e8, 4):
        moments.merge(Moments().update(part))
    np.testing.assert_allclose(moments.mean_covariance()[1], np.cov(deviations, rowvar=False), rtol=1e-7)


def test_weights_are_repeats(rng, monkeypatch):
    monkeypatch.setattr(frechet, "BLOCK_ROWS", 7)
    features, weights = rng.standard_normal((20, 3)), rng.integers(0, 3, 20)
    weights[7:14] = 0  # a block without any
    assert_moments(Moments().update(features, weights), features.repeat(weights, axis=0))


def test_moments_bad_input(rng):
    moments = Moments().update(np.ones((5, 2)))
    with pytest.raises(ValueError, match=r"features must be \(n, 2\), got shape \(4, 3\)"):
        moments.update(np.ones((4, 3)))
    with pytest.raises(ValueError, match="image 6 has a non-finite feature"):
        moments.update(np.array([[1, 1], [1, np.inf]]))
    with pytest.raises(ValueError, match="of 3 features cannot be merged with those of 2"):
        moments.merge(Moments().update(np.ones((1, 3))))
    with pytest.raises(ValueError, match="at least two images"):
        Moments().update(np.ones((1, 2))).mean_covariance()


# --- Bootstrap


def test_bootstrap_spread_is_that_of_independent_sets(rng):
    """The standard deviation over 300 sets of 400 images, and that from 300 resamples of each of three of them."""
    sigma = np.diag([1.0, 2.0, 0.5])
    mu = np.zeros(3)

    def draw():
        return rng.multivariate_normal([0.3, 0, 0], 1.5 * sigma, size=400)

    independent = np.std([frechet_distance(mu, sigma, *mean_covariance(draw())) for _ in range(300)])
    resampled = [bootstrap_frechet(mu, sigma, draw(), 300, seed=1).std() for _ in range(3)]
    assert np.mean(resampled) == pytest.approx(independent, rel=0.15)


def test_bootstrap_is_a_function_of_seed_and_number(rng):
    features, mu, sigma = rng.standard_normal((40, 3)).astype(np.float32), np.zeros(3), np.eye(3)
    distances = bootstrap_frechet(mu, sigma, features, 5, seed=3)
    assert distances.shape == (5,) and len(set(distances)) == 5
    np.testing.assert_array_equal(distances[:2], bootstrap_frechet(mu, sigma, features, 2, seed=3))
    assert set(distances).isdisjoint(bootstrap_frechet(mu, sigma, features, 5, seed=4))


def test_bootstrap_bad_input(rng):
    features, mu, sigma = rng.standard_normal((40, 3)), np.zeros(3), np.eye(3)
    with pytest.raises(ValueError, match="num_resamples must be at least 1, got 0"):
        bootstrap_frechet(mu, sigma, features, 0, seed=0)
    with pytest.raises(ValueError, match=r"features must be \(N, D\).*\(3,\), got shape \(40, 2\)"):
        bootstrap_frechet(mu, sigma, features[:, :2], 1, seed=0)
    features[7, 1] = np.nan
    with pytest.raises(ValueError, match="image 7 has a non-finite feature"):
        bootstrap_frechet(mu, sigma, features, 1, seed=0)
