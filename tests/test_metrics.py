"""Inception score and kernel distance against golden numbers, closed forms and independent implementations."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from evaluations.metrics import inception_score, kernel_distance

# --- Inception score


@pytest.mark.parametrize("split_size", [500, 5000])
def test_inception_score_golden(adm_golden, split_size):
    expected = float(adm_golden[f"inception_score_split{split_size}"])
    assert inception_score(adm_golden["softmax"], split_size) == pytest.approx(expected, rel=1e-6)


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


# --- Kernel distance


def test_kernel_distance_of_whole_sets_agrees_with_torch_fidelity(rng):
    """Where a subset is the whole set, what is drawn is its order alone."""
    ref, gen = rng.standard_normal((60, 8)), 1.3 * rng.standard_normal((60, 8)) + 0.2
    theirs = kid_features_to_metric(
        torch.from_numpy(ref), torch.from_numpy(gen), kid_subsets=3, kid_subset_size=60, verbose=False
    )
    mean, std = kernel_distance(ref, gen, num_subsets=3, subset_size=60)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert std == pytest.approx(0, abs=1e-12)


def test_kernel_distance_written_out():
    """Pairs of different points within each set, all pairs between them."""
    ref, gen = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), np.array([[0.0, 0.0], [1.0, -1.0], [3.0, 0.0]])

    def kernel(x, y):
        return (x @ y / 2 + 1) ** 3

    within = sum(np.mean([kernel(points[i], points[j]) for i in range(3) for j in range(3) if i != j]) for points in (ref, gen))
    between = np.mean([kernel(x, y) for x in ref for y in gen])
    assert kernel_distance(ref, gen, num_subsets=1, subset_size=3)[0] == pytest.approx(within - 2 * between, rel=1e-12)


def test_kernel_distance_is_unbiased(rng):
    """Sets of one distribution: 0 on average, whatever the subsets' size; the subsets differ."""
    ref, gen = rng.standard_normal((2, 2000, 4))
    mean, std = kernel_distance(ref, gen, num_subsets=100, subset_size=50)
    assert std > 0 and abs(mean) < 4 * std / 10


def test_kernel_distance_is_a_function_of_the_seed(rng):
    ref, gen = (torch.from_numpy(points) for points in rng.standard_normal((2, 50, 3)).astype(np.float32))
    first = kernel_distance(ref, gen, num_subsets=4, subset_size=10, seed=1)
    assert first == kernel_distance(ref, gen, num_subsets=4, subset_size=10, seed=1)
    assert first != kernel_distance(ref, gen, num_subsets=4, subset_size=10, seed=2)


def test_kernel_distance_bad_input(rng):
    ref, gen = rng.standard_normal((30, 3)), rng.standard_normal((20, 3))
    with pytest.raises(ValueError, match=r"subset_size 1000: .* the smaller set has 20, pass subset_size=20 or less"):
        kernel_distance(ref, gen)
    with pytest.raises(ValueError, match="subset_size 1: "):
        kernel_distance(ref, gen, subset_size=1)
    with pytest.raises(ValueError, match="num_subsets must be at least 1, got 0"):
        kernel_distance(ref, gen, num_subsets=0, subset_size=10)
    with pytest.raises(ValueError, match=r"the kernel distance needs features .*\(30, 3\) and \(20, 2\)"):
        kernel_distance(ref, gen[:, :2])
    gen[4, 0] = np.nan
    with pytest.raises(ValueError, match="image 4 has a non-finite gen feature"):
        kernel_distance(ref, gen)
