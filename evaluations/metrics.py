"""The metrics of generated images, from features: Frechet distance, inception score, precision and recall as the ADM evaluation
defines them, and density and coverage and the kernel distance beside them.

All results are those of float64 arithmetic, so that they do not depend on block sizes or on the machine. Sets of 50,000 x 2048
features fit; no N x N matrix is formed.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from evaluations import neighbours
from evaluations.frechet import Array, Moments, bootstrap_frechet, frechet_distance, mean_covariance, require_finite
from runtime import draws

__all__ = [
    "Moments",
    "bootstrap_frechet",
    "density_coverage",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "mean_covariance",
    "membership",
    "precision_recall",
    "require_finite",
]

ADM_DISTANCE_ROWS = 10_000  # ADM's blocks: whether one overflows float16 is decided for the block as a whole


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

    Precision is the share of ``gen`` inside some ball of ``ref``; recall is the share of ``ref`` inside some ball of ``gen``.
    Balls, arguments and errors: see :func:`membership`.
    """
    gen_inside, ref_inside = membership(ref, gen, k, half)
    return float(gen_inside.mean()), float(ref_inside.mean())


def membership(ref: Array, gen: Array, k: int = 3, half: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Which of ``gen`` (M, D) are inside some ball of ``ref`` (N, D), and which of ``ref`` inside some ball of ``gen``.

    Two bool arrays, (M,) and (N,). A point's ball reaches to its k-th nearest neighbour within its own set (itself not
    counted) and includes its surface.

    half: False decides as float64 does; True reproduces ADM's script, whose inputs and arithmetic are float16, and float32 in
    a block of 10,000 x 10,000 where a float16 value overflows.

    Tensors are worked on where they are (CPU or CUDA; on the CPU instead of on MPS, which has no float64). Raises ValueError
    for shapes that do not fit, for sets of k images or fewer, and for a non-finite feature, naming the image.
    """
    ref, gen = _checked(ref, gen, "precision and recall need", k)
    gen_inside, ref_inside = (_half_membership if half else neighbours.membership)(ref, gen, k)
    return gen_inside.cpu().numpy(), ref_inside.cpu().numpy()


def density_coverage(ref: Array, gen: Array, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020) of ``gen`` (M, D) against ``ref`` (N, D), with the balls of ``ref`` only.

    Density: in how many balls a point of ``gen`` is on average, over k; 1 is expected of sets of one distribution, and an
    outlier's wide ball counts no more than another. Coverage: the share of balls that hold a point of ``gen``. A ball
    includes its surface, as in :func:`precision_recall`; the authors' script leaves it out, which tells only for exact ties,
    as when a set is compared with itself. Errors: see :func:`membership`.
    """
    ref, gen = _checked(ref, gen, "density and coverage need", k)
    counts, is_used = neighbours.ball_counts(ref, gen, k)
    return int(counts.sum()) / (k * len(gen)), float(is_used.double().mean())


def kernel_distance(
    ref: Array, gen: Array, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel inception distance (Binkowski et al. 2018) of ``ref`` (N, D) and ``gen`` (M, D): (mean, std) over subsets.

    Each value is the unbiased estimate of the squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, in float64, of
    subset_size images of either set, drawn without replacement; it may be negative. The draws are a function of (seed, subset).
    Raises ValueError for shapes that do not fit, for a subset_size below 2 or above the smaller set, and for a non-finite
    feature, naming the image.
    """
    ref, gen = (features.cpu().numpy() for features in _checked(ref, gen, "the kernel distance needs"))
    smaller = min(len(ref), len(gen))
    if not 2 <= subset_size <= smaller:
        raise ValueError(
            f"subset_size {subset_size}: subsets are of 2 images or more and the smaller set has {smaller}, "
            f"pass subset_size={smaller} or less"
        )
    if num_subsets < 1:
        raise ValueError(f"num_subsets must be at least 1, got {num_subsets}")
    values = np.empty(num_subsets)
    for subset in range(num_subsets):
        chosen = []
        for step, features in enumerate((ref, gen), start=1):
            stream = draws.generator(seed, draws.Purpose.METRIC_RESAMPLE, subset, step)
            chosen.append(features[stream.permutation(len(features))[:subset_size]].astype(np.float64))
        values[subset] = _squared_discrepancy(*chosen)
    return float(values.mean()), float(values.std())


def _squared_discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased estimate of MMD^2 (Gretton et al. 2012, equation 3) of x (n, D) and y (n, D): within a set, no pair (i, i)."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = 0.0
    for points in (x, y):
        values = kernel(points, points)
        within += (values.sum() - np.trace(values)) / (len(points) * (len(points) - 1))
    return within - 2 * kernel(x, y).mean()


def _checked(ref: Array, gen: Array, who_needs: str, k: int | None = None) -> tuple[Tensor, Tensor]:
    """Both sets as tensors on a device with float64. Raises ValueError for what they must not be, k being the neighbour."""
    ref, gen = torch.as_tensor(ref).detach(), torch.as_tensor(gen).detach()
    if ref.ndim != 2 or gen.ndim != 2 or ref.shape[1] != gen.shape[1]:
        raise ValueError(f"{who_needs} features (N, D) and (M, D), got {tuple(ref.shape)} and {tuple(gen.shape)}")
    if k is not None and k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    for name, features in (("ref", ref), ("gen", gen)):
        if k is not None and len(features) <= k:
            raise ValueError(f"{name} has {len(features)} images; the distance to neighbour {k} needs at least {k + 1}")
        require_finite(features, f"{name} feature")
    return tuple(features.cpu() if features.device.type == "mps" else features for features in (ref, gen))


def _half_membership(ref: Tensor, gen: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """:func:`membership` in ADM's arithmetic."""
    ref_radii, gen_radii = _half_radii(ref, k), _half_radii(gen, k)
    gen_inside = torch.zeros(len(gen), dtype=torch.bool, device=gen.device)
    ref_inside = torch.zeros(len(ref), dtype=torch.bool, device=ref.device)
    for rows, columns, distances in _half_blocks(gen, ref):
        gen_inside[rows] |= (distances <= ref_radii[columns]).any(dim=1)
        ref_inside[columns] |= (distances <= gen_radii[rows, None]).any(dim=0)
    return gen_inside, ref_inside


def _half_radii(points: Tensor, k: int) -> Tensor:
    """Squared distance (N,) of every point to its k-th neighbour; the point itself is neighbour 0."""
    nearest = torch.full((len(points), k + 1), torch.inf, dtype=torch.float64, device=points.device)
    for rows, _, distances in _half_blocks(points, points):
        block_nearest = distances.topk(min(k + 1, distances.shape[1]), largest=False).values
        nearest[rows] = torch.cat([nearest[rows], block_nearest.double()], dim=1).topk(k + 1, largest=False).values
    return nearest.amax(dim=1)


def _half_blocks(a: Tensor, b: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (rows of a, rows of b, their squared distances) until every pair has been seen."""
    for i in range(0, len(a), ADM_DISTANCE_ROWS):
        for j in range(0, len(b), ADM_DISTANCE_ROWS):
            u, v = a[i : i + ADM_DISTANCE_ROWS], b[j : j + ADM_DISTANCE_ROWS]
            yield slice(i, i + len(u)), slice(j, j + len(v)), _half_distances(u, v)


def _half_distances(u: Tensor, v: Tensor) -> Tensor:
    """|u|^2 - 2uv + |v|^2, (n, D), (m, D) -> (n, m), clamped at 0, as float16 hardware computes it.

    Every stored intermediate is float16, sums accumulate in float32. If any distance is not finite, all are float32.
    """

    def squared_norms(x: Tensor) -> Tensor:
        return x.square().float().sum(dim=1).half()

    u16, v16 = u.half(), v.half()
    # A product of two float16 numbers is exact in float32, where CPUs are fast.
    products = (u16.float() @ v16.float().T).half()
    distances = (squared_norms(u16)[:, None] - products.mul_(2)).add_(squared_norms(v16)).clamp_(min=0)
    if distances.isfinite().all():
        return distances
    u, v = u.float(), v.float()
    distances = (u @ v.T).mul_(-2)
    return distances.add_(u.square().sum(dim=1)[:, None]).add_(v.square().sum(dim=1)).clamp_(min=0)
