"""Frechet distance, inception score, and improved precision and recall, as the ADM evaluation defines them.

Everything is computed in float64, so that the numbers do not depend on block sizes or on the machine. Sets of 50,000 x 2048
features fit; no N x N matrix is formed.
"""

from collections.abc import Iterator

import numpy as np
import torch

COVARIANCE_ROWS = 4096  # rows converted to float64 at once
DISTANCE_ROWS = 2048  # rows and columns of a block of float64 distances: 32 MiB
ADM_DISTANCE_ROWS = 10_000  # ADM's blocks: whether one overflows float16 is decided for the block as a whole

Array = np.ndarray | torch.Tensor


def mean_covariance(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D), divisor N - 1, float64, of features (N, D).

    Two passes: deviations are taken from the final mean, so a mean far larger than the spread costs no digits.
    Raises ValueError for fewer than two rows and for a non-finite feature, naming the image.
    """
    features = np.asarray(features)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"a covariance needs features (N, D) of at least two images, got shape {features.shape}")
    require_finite(features)
    mu = features.mean(axis=0, dtype=np.float64)
    sigma = np.zeros((features.shape[1],) * 2)
    for start in range(0, len(features), COVARIANCE_ROWS):
        deviations = features[start : start + COVARIANCE_ROWS] - mu  # float64 (n, D)
        sigma += deviations.T @ deviations
    return mu, sigma / (len(features) - 1)


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians (Dowson & Landau 1982): mu (D,), sigma (D, D).

    |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^1/2). The last trace is the sum of the singular values of
    sigma1^1/2 sigma2^1/2, which exists for singular covariances as well and needs no square root of a non-symmetric matrix.
    Raises ValueError for shapes that do not fit, for non-finite entries and for matrices that are no covariances.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(value, dtype=np.float64) for value in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape:
        raise ValueError(f"the means must both be (D,), got {mu1.shape} and {mu2.shape}: were the same features used for both?")
    for name, sigma in (("sigma1", sigma1), ("sigma2", sigma2)):
        if sigma.shape != mu1.shape * 2:
            raise ValueError(f"{name} must be {mu1.shape * 2} for means of {mu1.shape}, got {sigma.shape}")
    for name, value in (("mu1", mu1), ("sigma1", sigma1), ("mu2", mu2), ("sigma2", sigma2)):
        if not np.isfinite(value).all():
            raise ValueError(f"{name} has a non-finite entry: compute the statistics again from finite features")
    root1, root2 = _covariance_root(sigma1, "sigma1"), _covariance_root(sigma2, "sigma2")
    trace_root = np.linalg.svd(root1 @ root2, compute_uv=False).sum()
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_root
    return max(0.0, float(distance))  # a distance of zero comes out as +-1e-13


def _covariance_root(sigma: np.ndarray, name: str) -> np.ndarray:
    """The symmetric square root (D, D) of a covariance."""
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    # Rounding leaves eigenvalues of either sign where the true one is 0. Their roots would be 1e-8 instead of 0: drop them.
    cutoff = len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    # Statistics stored in float32 have eigenvalues down to about -1e-7 of the largest; anything beyond is not rounding.
    if values[0] < -1e-4 * max(values[-1], 0.0):
        raise ValueError(f"{name} is no covariance: it has the eigenvalue {values[0]:.3g} (largest: {values[-1]:.3g})")
    roots = np.sqrt(np.where(values > cutoff, values, 0.0))
    return (vectors * roots) @ vectors.T


def inception_score(probs: Array, split_size: int = 5000) -> float:
    """Inception score (Salimans et al. 2016) of class probabilities (N, classes).

    The mean over splits of exp(mean over x of KL(p(y|x) || p(y))), p(y) being the mean within the split. A shorter
    last split counts as much as the others. Zero probabilities are allowed.
    Raises ValueError for no rows and for probabilities that are negative or non-finite, naming the image.
    """
    probs = np.asarray(probs)
    if probs.ndim != 2 or len(probs) == 0:
        raise ValueError(f"the inception score needs probabilities (N, classes) of at least one image, got shape {probs.shape}")
    if split_size < 1:
        raise ValueError(f"split_size must be at least 1, got {split_size}")
    require_finite(probs, "probability")
    if probs.min() < 0:
        raise ValueError(
            f"image {int(probs.min(axis=1).argmin())} has a negative probability: pass the softmax, not the logits"
        )
    scores = []
    for start in range(0, len(probs), split_size):
        conditional = probs[start : start + split_size].astype(np.float64)
        marginal = np.broadcast_to(conditional.mean(axis=0), conditional.shape)
        ratio = np.divide(conditional, marginal, out=np.ones_like(conditional), where=conditional > 0)  # 0 log 0 = 0
        scores.append(np.exp((conditional * np.log(ratio)).sum(axis=1).mean()))
    return float(np.mean(scores))


def precision_recall(ref: Array, gen: Array, k: int = 3, half: bool = False) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of ``gen`` (M, D) against ``ref`` (N, D): (precision, recall).

    A point's ball reaches to its k-th nearest neighbour within its own set (itself not counted) and includes its
    surface. Precision is the share of ``gen`` inside some ball of ``ref``; recall is the share of ``ref`` inside some ball of
    ``gen``.

    half: False computes distances in float64; True reproduces ADM's script, whose inputs and arithmetic are float16, and
    float32 in a block of 10,000 x 10,000 where a float16 value overflows.

    Tensors are worked on where they are (CPU or CUDA). Raises ValueError for shapes that do not fit, for sets of k images or
    fewer, and for a non-finite feature, naming the image.
    """
    ref, gen = torch.as_tensor(ref), torch.as_tensor(gen)
    if ref.ndim != 2 or gen.ndim != 2 or ref.shape[1] != gen.shape[1]:
        raise ValueError(f"precision and recall need features (N, D) and (M, D), got {tuple(ref.shape)} and {tuple(gen.shape)}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    for name, features in (("ref", ref), ("gen", gen)):
        if len(features) <= k:
            raise ValueError(f"{name} has {len(features)} images; the distance to neighbour {k} needs at least {k + 1}")
        require_finite(features, f"{name} feature")
    ref_radii, gen_radii = _radii(ref, k, half), _radii(gen, k, half)
    gen_inside = torch.zeros(len(gen), dtype=torch.bool, device=gen.device)
    ref_inside = torch.zeros(len(ref), dtype=torch.bool, device=ref.device)
    for rows, columns, distances in _distance_blocks(gen, ref, half):
        gen_inside[rows] |= (distances <= ref_radii[columns]).any(dim=1)
        ref_inside[columns] |= (distances <= gen_radii[rows, None]).any(dim=0)
    return gen_inside.double().mean().item(), ref_inside.double().mean().item()


def _radii(points: torch.Tensor, k: int, half: bool) -> torch.Tensor:
    """Squared distance (N,) of every point to its k-th neighbour; the point itself is neighbour 0."""
    nearest = torch.full((len(points), k + 1), torch.inf, dtype=torch.float64, device=points.device)
    for rows, _, distances in _distance_blocks(points, points, half):
        block_nearest = distances.topk(min(k + 1, distances.shape[1]), largest=False).values
        nearest[rows] = torch.cat([nearest[rows], block_nearest.double()], dim=1).topk(k + 1, largest=False).values
    return nearest.amax(dim=1)


def _distance_blocks(a: torch.Tensor, b: torch.Tensor, half: bool) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Yield (rows of a, rows of b, their squared distances) until every pair has been seen."""
    size = ADM_DISTANCE_ROWS if half else DISTANCE_ROWS
    for i in range(0, len(a), size):
        for j in range(0, len(b), size):
            u, v = a[i : i + size], b[j : j + size]
            distances = _half_distances(u, v) if half else _distances(u.double(), v.double())
            yield slice(i, i + len(u)), slice(j, j + len(v)), distances


def _distances(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """|u|^2 - 2uv + |v|^2, (n, D), (m, D) -> (n, m), clamped at 0, in the dtype of its inputs."""
    distances = (u @ v.T).mul_(-2)
    return distances.add_(u.square().sum(dim=1)[:, None]).add_(v.square().sum(dim=1)).clamp_(min=0)


def _half_distances(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """:func:`_distances` as float16 hardware computes it: every stored intermediate is float16, sums accumulate in float32."""

    def squared_norms(x):
        return x.square().float().sum(dim=1).half()

    u16, v16 = u.half(), v.half()
    # A product of two float16 numbers is exact in float32, where CPUs are fast.
    products = (u16.float() @ v16.float().T).half()
    distances = (squared_norms(u16)[:, None] - products.mul_(2)).add_(squared_norms(v16)).clamp_(min=0)
    return distances if distances.isfinite().all() else _distances(u.float(), v.float())


def require_finite(values: Array, what: str = "feature", first_image: int = 0) -> None:
    """Raise ValueError naming the first image whose row of ``values`` (N, D) has a NaN or an infinity.

    Row 0 is image ``first_image``.
    """
    bad = ~torch.as_tensor(values).isfinite().all(dim=1)
    if bad.any():
        index = first_image + int(bad.nonzero()[0])
        raise ValueError(f"image {index} has a non-finite {what}: remove or regenerate it ({int(bad.sum())} such images here)")
