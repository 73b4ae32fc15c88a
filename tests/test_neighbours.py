"""Precision, recall, density and coverage against golden numbers, independent implementations and degenerate sets."""

import time

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch_fidelity.metric_prc import prc_features_to_metric

from evaluations import metrics, neighbours
from evaluations.metrics import density_coverage, membership, precision_recall


def written_out(ref, gen, k):
    """inside (M, N): whether gen i is in the ball of ref j; around (M, N): whether ref j is in the ball of gen i.

    In float64, from differences.
    """
    ref, gen = (np.asarray(points, np.float64) for points in (ref, gen))

    def distances(x, y):
        return np.stack([((point - y) ** 2).sum(axis=1) for point in x])

    ref_radii, gen_radii = (np.partition(distances(points, points), k, axis=1)[:, k] for points in (ref, gen))
    between = distances(gen, ref)
    return between <= ref_radii, between <= gen_radii[:, None]


def assert_exact(ref, gen, k=3):
    inside, around = written_out(ref, gen, k)
    gen_inside, ref_inside = membership(ref, gen, k)
    np.testing.assert_array_equal(gen_inside, inside.any(axis=1))
    np.testing.assert_array_equal(ref_inside, around.any(axis=0))
    density, coverage = density_coverage(ref, gen, k)
    assert density == pytest.approx(inside.sum() / (k * len(gen)), rel=1e-12)
    assert coverage == pytest.approx(inside.any(axis=0).mean(), rel=1e-12)


# --- Against others


@pytest.mark.parametrize("half", [False, True])
def test_precision_recall_golden(adm_golden, half):
    suffix = "half" if half else "exact"
    expected = float(adm_golden[f"precision_{suffix}"]), float(adm_golden[f"recall_{suffix}"])
    assert precision_recall(adm_golden["ref"], adm_golden["gen"], half=half) == pytest.approx(expected, rel=1e-12)


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
def test_blocks_do_not_change_the_result(adm_golden, monkeypatch, half, size):
    """Sizes that leave a remainder, and blocks of fewer columns than neighbours are sought."""
    ref, gen = adm_golden["ref"][:90], adm_golden["gen"][:70]
    whole = precision_recall(ref, gen, half=half)
    monkeypatch.setattr(metrics, "ADM_DISTANCE_ROWS", size)
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", size)
    monkeypatch.setattr(neighbours, "CENTRED_ROWS", size)
    monkeypatch.setattr(neighbours, "PAIR_ELEMENTS", 64 * size)
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


def test_half_falls_back_to_float32_when_float16_overflows(adm_golden):
    """Times 1000 squared norms exceed 65504; without the fallback all distances are inf or NaN."""
    ref, gen = 1000 * adm_golden["ref"], 1000 * adm_golden["gen"]
    expected = float(adm_golden["precision_exact"]), float(adm_golden["recall_exact"])
    assert precision_recall(ref, gen, half=True) == pytest.approx(expected, rel=1e-12)


def test_same_set_is_covered_and_far_set_is_not(adm_golden):
    points = adm_golden["ref"][:100]
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


def test_membership_is_whose_means_precision_and_recall_are(adm_golden):
    gen_inside, ref_inside = membership(adm_golden["ref"], adm_golden["gen"])
    assert gen_inside.dtype == ref_inside.dtype == bool
    assert (gen_inside.shape, ref_inside.shape) == ((700,), (900,))
    assert precision_recall(adm_golden["ref"], adm_golden["gen"]) == (gen_inside.mean(), ref_inside.mean())


def test_agrees_with_torch_fidelity(adm_golden):
    """Its first set is the generated one; in that order its precision and recall are the paper's and ours."""
    theirs = prc_features_to_metric(
        torch.from_numpy(adm_golden["gen"]), torch.from_numpy(adm_golden["ref"]), save_cpu_ram=False, verbose=False
    )
    expected = theirs["precision"], theirs["recall"]
    assert expected[0] != expected[1]
    assert precision_recall(adm_golden["ref"], adm_golden["gen"]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("k", [1, 5])
def test_density_and_coverage_agree_with_sklearn(rng, k):
    ref, gen = rng.standard_normal((150, 4)), 0.8 * rng.standard_normal((100, 4)) + 0.5
    radii = NearestNeighbors(n_neighbors=k + 1).fit(ref).kneighbors(ref)[0][:, -1]
    search = NearestNeighbors().fit(gen)
    held = np.array([len(search.radius_neighbors(ref[i : i + 1], radii[i])[0][0]) for i in range(len(ref))])
    assert density_coverage(ref, gen, k) == pytest.approx((held.sum() / (k * len(gen)), (held > 0).mean()), rel=1e-12)


def test_density_and_coverage_of_one_distribution(rng):
    """Density 1 is expected, and coverage 1 - (N - 1)...(N - k) / (2N - 1)...(2N - k), which tends to 1 - 2^-k: appendix of the
    paper."""
    ref, gen = rng.standard_normal((2, 1500, 3))
    density, coverage = density_coverage(ref, gen, k=5)
    assert density == pytest.approx(1, abs=0.05)
    assert coverage == pytest.approx(1 - 2**-5, abs=0.01)


def test_density_and_coverage_bad_input():
    good = np.random.default_rng(0).random((6, 3))
    with pytest.raises(ValueError, match=r"gen has 5 images.*at least 6"):
        density_coverage(good, good[:5])
    with pytest.raises(ValueError, match=r"density and coverage need features .*\(6, 3\) and \(6, 2\)"):
        density_coverage(good, good[:, :2])


# --- Where float32 cannot tell


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_every_dtype(rng, dtype):
    assert_exact((10 * rng.standard_normal((120, 6))).astype(dtype), (10 * rng.standard_normal((80, 6))).astype(dtype))


def test_grids_are_full_of_ties(rng):
    """Integer coordinates: most points are on the surface of some ball, and many coincide."""
    for high in (2, 4, 10):
        assert_exact(rng.integers(0, high, (300, 3)), rng.integers(0, high, (200, 3)), k=2)


@pytest.mark.parametrize("offset", [0, 1e3, 1e8])
def test_spread_small_against_the_mean(rng, offset):
    assert_exact(rng.standard_normal((150, 5)) + offset, rng.standard_normal((100, 5)) + offset)


@pytest.mark.parametrize("scale", [1e-18, 1e30])
def test_units_do_not_matter(rng, scale):
    """Squares of such numbers are beyond float32."""
    ref, gen = rng.standard_normal((100, 5)), rng.standard_normal((90, 5))
    assert_exact(scale * ref, scale * gen)
    assert precision_recall(scale * ref, scale * gen) == precision_recall(ref, gen)


@pytest.mark.parametrize("noise", [0, 1e-12, 1e-6, 1e-3])
def test_clusters_far_from_the_mean(rng, monkeypatch, noise):
    """As a collapsed generator makes them: five images again and again, which float32 cannot tell apart. The same in small
    blocks, and with few enough doubtful pairs allowed that every way of deciding is taken."""
    centres = 1000 * rng.standard_normal((5, 8))
    ref = centres[rng.integers(5, size=200)] + noise * rng.standard_normal((200, 8))
    gen = centres[rng.integers(5, size=150)] + noise * rng.standard_normal((150, 8))
    ref[:20], gen[:20] = 100 * rng.standard_normal((20, 8)), 100 * rng.standard_normal((20, 8))
    assert_exact(ref, gen)
    monkeypatch.setattr(neighbours, "FEW", 3)
    assert_exact(ref, gen)
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", 30)
    assert_exact(ref, gen)


def test_one_outlier_does_not_spoil_the_others(rng):
    ref, gen = rng.standard_normal((200, 5)), rng.standard_normal((150, 5))
    ref[17] = 1e9
    assert_exact(ref, gen)


def test_distances_do_not_depend_on_the_batch(rng):
    """Bit for bit, and the same from either end: equal distances must compare equal wherever they were computed."""
    points = torch.from_numpy(rng.standard_normal((50, 333)).astype(np.float32))
    cloud = neighbours.Cloud.around(points.double().mean(dim=0), points, 1.0)
    i, j = torch.randint(50, (2, 40))
    whole = neighbours._squared_distances(cloud, i, cloud, j)
    assert torch.equal(whole, neighbours._squared_distances(cloud, j, cloud, i))
    alone = [neighbours._squared_distances(cloud, i[p : p + 1], cloud, j[p : p + 1]) for p in range(40)]
    assert torch.equal(whole, torch.cat(alone))
    torch.testing.assert_close(whole, (points[i].double() - points[j].double()).square().sum(dim=1), rtol=1e-14, atol=0)


def test_bounds_hold(rng):
    """Coordinates of one sign, whose products' rounding errors add up."""
    x = torch.from_numpy(rng.random((200, 1024)).astype(np.float32))
    cloud = neighbours.Cloud.around(torch.zeros(1024, dtype=torch.float64), x, 1.0)
    ((_, _, products),) = neighbours._product_blocks(cloud, cloud)
    exact = (x.double()[:, None] - x.double()[None]).square().sum(dim=2)
    assert (products.double() + cloud.low[:, None].double() + cloud.low.double() <= exact).all()
    assert (products.double() + cloud.high[:, None].double() + cloud.high.double() >= exact).all()


# --- Degenerate sets of a size at which doing everything in float64 from differences would take minutes


@pytest.fixture
def seconds():
    began = time.process_time()
    return lambda: time.process_time() - began


def test_identical_images(rng, seconds):
    """Radii are 0, and whoever is elsewhere is outside. Each of 9 million pairs is a tie, for which no bound but 0 will do."""
    ref = np.ones((3000, 512), np.float32)
    gen = ref.copy()
    gen[:30] = rng.random((30, 512))
    assert precision_recall(ref, gen) == (2970 / 3000, 1)
    assert precision_recall(ref, ref) == (1, 1)
    density, coverage = density_coverage(ref, gen)
    assert (density, coverage) == (2970 * 3000 / (5 * 3000), 1)
    assert seconds() < 30


def test_nearly_identical_images(rng, seconds):
    """Two clusters of 1000 images each that differ in the sixth digit, and 100 elsewhere."""
    centres = np.concatenate([np.repeat(rng.random((2, 256)), 1000, axis=0), rng.random((100, 256))])
    noise = np.where(np.arange(2100) < 2000, 1e-6, 0.1)[:, None]
    ref, gen = (torch.from_numpy((centres + noise * rng.standard_normal(centres.shape)).astype(np.float32)) for _ in range(2))
    gen_inside, ref_inside = membership(ref, gen)
    assert seconds() < 30

    def distances(x, y):
        return torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")

    ref_radii, gen_radii = (distances(points, points).kthvalue(4, dim=1).values for points in (ref, gen))
    between = distances(gen, ref)
    np.testing.assert_array_equal(gen_inside, (between <= ref_radii).any(dim=1))
    np.testing.assert_array_equal(ref_inside, (between <= gen_radii[:, None]).any(dim=0))
    assert 0.1 < gen_inside[:2000].mean() < 0.9
