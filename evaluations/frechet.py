"""Means and covariances of feature sets too large for memory, and the Frechet distance between them."""

from typing import NamedTuple, Self

import numpy as np
import scipy.linalg
import torch

from runtime import draws

Array = np.ndarray | torch.Tensor

BLOCK_ROWS = 1024  # rows converted to float64 at once
# The eigenvalues of a product's square are trusted if they leave the distance uncertain by no more than this share of it ...
RELATIVE_ERROR = 1e-6
TRACE_ERROR = 1e-12  # ... or of the traces, whose own rounding ends there.
EPS = np.finfo(np.float64).eps


class Moments:
    """Mean and covariance of feature rows that arrive in batches (Chan, Golub & LeVeque 1983), in float64.

    Deviations are taken from each block's own mean, so that a mean far larger than the spread costs no digits. Memory: one
    (D, D) matrix and one block, however many rows. Processes that saw different rows exchange :meth:`state` and
    :meth:`merge`; the order of rows and the blocks change the result by rounding only.
    """

    def __init__(self):
        self.count = 0  # rows so far
        self.mean: np.ndarray | None = None  # (D,)
        self._scatter: np.ndarray | None = None  # (D, D): sum of (x - mean)(x - mean)^T, below the diagonal 0

    def update(self, features: Array, weights: np.ndarray | None = None) -> Self:
        """Add the rows of features (n, D). weights: integers (n,), how often each row counts; None: once.

        Raises ValueError for another D than before and for a non-finite feature, naming the image: row 0 is ``self.count``.
        """
        features = np.asarray(features)
        if features.ndim != 2 or (self.mean is not None and features.shape[1:] != self.mean.shape):
            expected = "(n, D)" if self.mean is None else f"(n, {len(self.mean)})"
            raise ValueError(f"features must be {expected}, got shape {features.shape}")
        first_image = self.count
        for start in range(0, len(features), BLOCK_ROWS):
            block = features[start : start + BLOCK_ROWS]
            require_finite(block, first_image=first_image + start)
            if weights is None:
                count, mean = len(block), block.mean(axis=0, dtype=np.float64)
            else:
                repeats = weights[start : start + BLOCK_ROWS]
                block, repeats = block[repeats > 0], repeats[repeats > 0]
                count = int(repeats.sum())
                mean = repeats.astype(np.float64) @ block / max(count, 1)
            if count:
                deviations = np.empty((len(block) + 1, len(mean)))
                np.subtract(block, mean, out=deviations[:-1])
                if weights is not None:
                    deviations[:-1] *= np.sqrt(repeats)[:, None]
                self._add(count, mean, deviations)
        return self

    def merge(self, other: "Moments") -> Self:
        """Add the rows that ``other`` has seen; it is left as it is."""
        if other.count:
            if self.count and self.mean.shape != other.mean.shape:
                raise ValueError(f"moments of {len(other.mean)} features cannot be merged with those of {len(self.mean)}")
            self._add(other.count, other.mean, np.empty((1, len(other.mean))))
            self._scatter += other._scatter
        return self

    def mean_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) and covariance (D, D), divisor count - 1. Raises ValueError before there are two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs features (N, D) of at least two images, got {self.count}")
        sigma = self._scatter + self._scatter.T
        np.fill_diagonal(sigma, self._scatter.diagonal())
        sigma /= self.count - 1
        return self.mean.copy(), sigma

    def state(self) -> dict[str, np.ndarray]:
        """What another process needs: count (), mean (D,), scatter (D, D); D is 0 before the first row."""
        mean, scatter = (np.empty(0), np.empty((0, 0))) if self.mean is None else (self.mean, self._scatter)
        return {"count": np.array(self.count), "mean": mean.copy(), "scatter": scatter.copy()}

    @classmethod
    def from_state(cls, state: dict[str, Array]) -> Self:
        """The moments whose :meth:`state` it is."""
        moments = cls()
        moments.count = int(state["count"])
        if moments.count:
            moments.mean = np.array(state["mean"], np.float64)
            moments._scatter = np.array(state["scatter"], np.float64, order="F")
        return moments

    def _add(self, count: int, mean: np.ndarray, deviations: np.ndarray) -> None:
        """Add ``count`` rows with this mean, whose deviations from it are given (m + 1, D), the last row to be filled here."""
        if self.mean is None:
            self.mean, self._scatter = np.zeros(len(mean)), np.zeros((len(mean),) * 2, order="F")
        total = self.count + count
        shift = mean - self.mean
        deviations[-1] = shift * np.sqrt(self.count / total * count)  # of the two means from that of all
        self._scatter = scipy.linalg.blas.dsyrk(1.0, deviations.T, beta=1.0, c=self._scatter, overwrite_c=1)
        self.mean += shift * (count / total)
        self.count = total


def mean_covariance(features: Array) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D), divisor N - 1, float64, of features (N, D).

    A mean far larger than the spread costs no digits. Raises ValueError for fewer than two rows and for a non-finite feature,
    naming the image.
    """
    features = np.asarray(features)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"a covariance needs features (N, D) of at least two images, got shape {features.shape}")
    return Moments().update(features).mean_covariance()


class Gaussian(NamedTuple):
    """A normal distribution in the form in which it is compared."""

    mu: np.ndarray  # (D,)
    factor: np.ndarray  # (rank, D): the covariance is factor^T factor
    trace: float  # of the covariance

    @classmethod
    def from_moments(cls, mu: Array, sigma: Array, suffix: str = "") -> Self:
        """mu (D,), sigma (D, D). Raises ValueError, with the names mu and sigma plus ``suffix``, for what is no Gaussian."""
        mu, sigma = np.asarray(mu, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
        if mu.ndim != 1 or sigma.shape != mu.shape * 2:
            raise ValueError(f"sigma{suffix} must be {mu.shape * 2} for means of {mu.shape}, got {sigma.shape}")
        for name, value in (("mu", mu), ("sigma", sigma)):
            if not np.isfinite(value).all():
                raise ValueError(f"{name}{suffix} has a non-finite entry: compute the statistics again from finite features")
        return cls(mu, _factor(sigma, f"sigma{suffix}"), float(np.trace(sigma)))


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians (Dowson & Landau 1982): mu (D,), sigma (D, D).

    |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^1/2). With sigma = R^T R the last trace is the sum of the
    singular values of R1 R2^T, which exists for singular covariances as well and needs no square root of a non-symmetric
    matrix. Raises ValueError for shapes that do not fit, for non-finite entries and for matrices that are no covariances.
    """
    shapes = np.shape(mu1), np.shape(mu2)
    if len(shapes[0]) != 1 or shapes[0] != shapes[1]:
        raise ValueError(f"the means must both be (D,), got {shapes[0]} and {shapes[1]}: were the same features used for both?")
    return _distance(Gaussian.from_moments(mu1, sigma1, "1"), Gaussian.from_moments(mu2, sigma2, "2"))


def bootstrap_frechet(mu: Array, sigma: Array, features: Array, num_resamples: int, seed: int) -> np.ndarray:
    """Frechet distances (num_resamples,) of bootstrap resamples of features (N, D) to the Gaussian mu (D,), sigma (D, D).

    For the uncertainty of an FID that comes from the choice of the N images. A resample has fewer distinct images than the
    set, which biases its distance upwards, by about as much again as that of the set itself: report the standard deviation
    of these distances, the interval FID +- 1.96 std, not their mean or quantiles.

    Resample r is a function of (seed, r). A resample costs a covariance and a distance, and no copy of the features beyond a
    block. Raises ValueError as :func:`frechet_distance` and :func:`mean_covariance` do, and for fewer than 1 resample.
    """
    features = np.asarray(features)
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")
    if features.ndim != 2 or len(features) < 2 or features.shape[1:] != np.shape(mu):
        raise ValueError(
            f"features must be (N, D) of at least two images, D as in mu of {np.shape(mu)}, got shape {features.shape}"
        )
    reference, num_images = Gaussian.from_moments(mu, sigma), len(features)
    distances = np.empty(num_resamples)
    for resample in range(num_resamples):
        chosen = draws.generator(seed, draws.Purpose.METRIC_RESAMPLE, resample).integers(num_images, size=num_images)
        repeats = np.bincount(chosen, minlength=num_images)
        moments = Moments().update(features, repeats)
        distances[resample] = _distance(reference, Gaussian.from_moments(*moments.mean_covariance()))
    return distances


def _distance(one: Gaussian, two: Gaussian) -> float:
    means_and_traces = ((one.mu - two.mu) ** 2).sum() + one.trace + two.trace
    product = one.factor @ two.factor.T  # (rank 1, rank 2)
    if product.size == 0:
        return float(means_and_traces)
    # Eigenvalues of the smaller square take a quarter of the time of singular values, but cost half the digits of small ones.
    square = product @ product.T if len(product) <= len(product.T) else product.T @ product
    values = np.linalg.eigvalsh(square)
    error = EPS * values[-1]  # of each eigenvalue; of its root, error / (2 root)
    distance = means_and_traces - 2 * np.sqrt(values.clip(min=0)).sum()
    uncertainty = 2 * (error / np.sqrt(values.clip(min=error))).sum() if error > 0 else 0.0
    if uncertainty > max(RELATIVE_ERROR * distance, TRACE_ERROR * means_and_traces):
        distance = means_and_traces - 2 * np.linalg.svd(product, compute_uv=False).sum()
    return max(0.0, float(distance))  # a distance of zero comes out as +-1e-13


def _factor(sigma: np.ndarray, name: str) -> np.ndarray:
    """R (rank, D) with R^T R = sigma (D, D), of which the upper triangle is read; what is 0 but for rounding is left out."""
    # Rounding leaves 1e-16 where the truth is 0. Its root would be 1e-8.
    cutoff = len(sigma) * EPS * sigma.diagonal().max(initial=0.0)
    try:
        root = scipy.linalg.cholesky(sigma, check_finite=False)
        if (root.diagonal() ** 2).min() > cutoff:
            return root
    except np.linalg.LinAlgError:
        pass
    packed, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma, tol=cutoff)  # Cholesky with the largest pivot first
    order, root = pivots - 1, np.triu(packed)[:rank]
    rest = sigma[np.ix_(order[rank:], order[rank:])] - root[:, rank:].T @ root[:, rank:]
    if np.abs(rest).max(initial=0.0) <= 10 * cutoff:
        factor = np.empty_like(root)
        factor[:, order] = root
        return factor
    return _eigen_factor(sigma, cutoff, name)


def _eigen_factor(sigma: np.ndarray, cutoff: float, name: str) -> np.ndarray:
    """:func:`_factor` of a matrix with negative eigenvalues, if they are small."""
    values, vectors = np.linalg.eigh(sigma, UPLO="U")
    # Statistics stored in float32 have eigenvalues down to about -1e-7 of the largest; anything beyond is not rounding.
    if values[0] < -1e-4 * max(values[-1], 0.0):
        raise ValueError(f"{name} is no covariance: it has the eigenvalue {values[0]:.3g} (largest: {values[-1]:.3g})")
    kept = values > cutoff
    return (vectors[:, kept] * np.sqrt(values[kept])).T


def require_finite(values: Array, what: str = "feature", first_image: int = 0) -> None:
    """Raise ValueError naming the first image whose row of ``values`` (N, D) has a NaN or an infinity.

    Row 0 is image ``first_image``.
    """
    is_tensor = isinstance(values, torch.Tensor)
    with np.errstate(over="ignore", invalid="ignore"):
        if (torch if is_tensor else np).isfinite(values.sum(1)).all():  # far faster than looking at each value, if it is so
            return
    bad = ~values.isfinite().all(dim=1) if is_tensor else ~np.isfinite(values).all(axis=1)
    if bad.any():
        index = first_image + int(bad.nonzero()[0][0])
        raise ValueError(f"image {index} has a non-finite {what}: remove or regenerate it ({int(bad.sum())} such images here)")
