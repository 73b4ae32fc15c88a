"""Metrics against golden numbers, closed forms and independent implementations."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.neighbors import NearestNeighbors

from evaluations import metrics
from evaluations.metrics import frechet_distance, inception_score, mean_covariance, precision_recall

GOLDEN = Path(__file__).parent / "golden" / "adm_metrics.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def random_covariance(rng, size, rank=None):
    factor = rng.standard_normal((size, rank or 2 * size))
    return factor @ factor.T / factor.shape[1]


# --- Frechet distance


def test_frechet_golden(golden):
    value = frechet_distance(*mean_covariance(golden["ref"]), *mean_covariance(golden["gen"]))
    assert value == pytest.approx(float(golden["frechet"]), rel=1e-6)


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
    monkeypatch.setattr(metrics, "COVARIANCE_ROWS", 7)
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


# --- Inception score


@pytest.mark.parametrize("split_size", [500, 5000])
def test_inception_score_golden(golden, split_size):
    expected = float(golden[f"inception_score_split{split_size}"])
    assert inception_score(golden["softmax"], split_size) == pytest.approx(expected, rel=1e-6)


def test_inception_score_closed_forms():
    """Sure and evenly spread: the number of classes, and zero probabilities are no NaN. The same answer for every image: 1."""
    assert inception_score(np.eye(8)[np.arange(80) % 8]) == pytest.approx(8, rel=1e-12)
    assert inception_score(np.tile([0.2, 0.3, 0.5], (10, 1))) == pytest.approx(1, rel=1e-12)


def test_shorter_last_split_counts_equally():
    """Splits of 4 and 2 images with scores 4 and 2: their mean is 3, not weighted by images."""
    probs = np.eye(4)[[0, 1, 2, 3, 0, 1]]
    assert inception_score(probs, split_size=4) == pytest.approx(3, rel=1e-12)


def test_inception_score_bad_input():
    probs = np.full((4, 2), 0.5)
    with pytest.raises(ValueError, match="image 2 has a negative probability"):
        inception_score(np.where(np.arange(4)[:, None] == 2, -1.0, probs))
    with pytest.raises(ValueError, match="image 1 has a non-finite probability"):
        inception_score(np.where(np.arange(4)[:, None] == 1, np.nan, probs))
    with pytest.raises(ValueError, match="at least one image"):
        inception_score(np.empty((0, 10)))
    with pytest.raises(ValueError, match="split_size must be at least 1"):
        inception_score(probs, split_size=0)


# --- Precision and recall


@pytest.mark.parametrize("half", [False, True])
def test_precision_recall_golden(golden, half):
    suffix = "half" if half else "exact"
    expected = float(golden[f"precision_{suffix}"]), float(golden[f"recall_{suffix}"])
    assert precision_recall(golden["ref"], golden["gen"], half=half) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_agrees_with_sklearn(rng, k):
    ref, gen = rng.standard_normal((120, 5)), 0.7 * rng.standard_normal((90, 5)) + 1

    def share_inside(points, centres):
        radii = NearestNeighbors(n_neighbors=k + 1).fit(centres).kneighbors(centres)[0][:, -1]
        distances = np.linalg.norm(points[:, None] - centres[None], axis=-1)
        return (distances <= radii).any(axis=1).mean()

    expected = share_inside(gen, ref), share_inside(ref, gen)
    assert min(expected) > 0 and max(expected) < 1
    assert precision_recall(ref, gen, k=k) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_blocks_do_not_change_the_result(golden, monkeypatch, half, size):
    """Sizes that leave a remainder, and blocks of fewer columns than neighbours are sought."""
    ref, gen = golden["ref"][:90], golden["gen"][:70]
    whole = precision_recall(ref, gen, half=half)
    monkeypatch.setattr(metrics, "ADM_DISTANCE_ROWS" if half else "DISTANCE_ROWS", size)
    assert precision_recall(ref, gen, half=half) == whole


def test_surface_belongs_to_the_ball():
    """On the integer line every radius (k = 1) is 1; a point at distance exactly 1 is inside, one at 2 is not."""
    ref = np.array([[0.0], [1.0], [2.0]])
    gen = np.array([[3.0], [4.0]])
    assert precision_recall(ref, gen, k=1) == (0.5, 1 / 3)


def test_distances_do_not_lose_digits():
    """In float32, |u|^2 - 2uv + |v|^2 of points 4000 from the origin is all rounding: the result would be arbitrary."""
    line = np.arange(6, dtype=np.float64)[:, None]
    near = precision_recall(line, line + 2.5, k=1)
    assert precision_recall(line + 4096, line + 4096 + 2.5, k=1) == near == (4 / 6, 4 / 6)


def test_half_falls_back_to_float32_when_float16_overflows(golden):
    """Times 1000 squared norms exceed 65504; without the fallback all distances are inf or NaN."""
    ref, gen = 1000 * golden["ref"], 1000 * golden["gen"]
    expected = float(golden["precision_exact"]), float(golden["recall_exact"])
    assert precision_recall(ref, gen, half=True) == pytest.approx(expected, rel=1e-12)


def test_same_set_is_covered_and_far_set_is_not(golden):
    points = golden["ref"][:100]
    assert precision_recall(points, points) == (1, 1)
    assert precision_recall(points, points + 1000) == (0, 0)


@pytest.mark.parametrize("half", [False, True])
def test_precision_recall_bad_input(half):
    good = np.random.default_rng(0).random((6, 3), np.float32)
    bad = good.copy()
    bad[4, 0] = np.inf
    with pytest.raises(ValueError, match="image 4 has a non-finite gen feature"):
        precision_recall(good, bad, half=half)
    with pytest.raises(ValueError, match="image 4 has a non-finite ref feature"):
        precision_recall(bad, good, half=half)
    with pytest.raises(ValueError, match=r"gen has 3 images.*at least 4"):
        precision_recall(good, good[:3], half=half)
    with pytest.raises(ValueError, match=r"\(6, 3\) and \(6, 2\)"):
        precision_recall(good, good[:, :2], half=half)
    with pytest.raises(ValueError, match="k must be at least 1"):
        precision_recall(good, good, k=0, half=half)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
