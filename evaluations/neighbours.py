"""Who lies within whose ball, exactly, in blocks: the distances behind precision, recall, density and coverage.

A ball reaches from a point to its k-th nearest neighbour in its own set. Almost every question about it has an obvious
answer, for which float32 products with a bound on their error do; those that lie within the bound are asked again in float64,
from the points' differences. So the results are those of float64 throughout, whatever the block size, the number of threads or
the device, at the speed of float32 (on consumer GPUs 32 times that of float64).
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

BLOCK_ROWS = 1536  # rows and columns of a block of distances: 9 MiB
MOST_WORKERS = 8  # blocks in work at once on a CPU
SPARE_NEIGHBOURS = 4  # nearest points kept beyond those sought, so that the last one is certain to be too far
# Up to so many doubtful points, one subtracts; from there on the error bound is improved first.
FEW = 64
CENTRED_ROWS = 64  # rows in float64 at once: 1 MiB, to stay in cache, as the next
PAIR_ELEMENTS = 2**17  # coordinates of differences in float64 at once
EPS32, EPS64 = 2.0**-24, 2.0**-53  # half a unit in the last place
UNDERFLOW = 1e-30  # more than what products of tiny coordinates can lose


@dataclass(frozen=True)
class Cloud:
    """Points (N, D), with what bounds their distances: for every pair, whatever the order of the sums in the product x.y is,

        low_x + low_y - 2 x.y  <=  |x - y|^2  <=  high_x + high_y - 2 x.y

    Rounding the product of D terms costs at most D EPS |x||y| (Higham 2002, section 3.1), that of coordinates, norms and sums a
    few EPS of |x|^2 + |y|^2, which is no less than 2 |x||y|. All distances are in units in which coordinates are about 1.
    """

    points: Tensor  # (N, D) as given
    scale: float  # a power of two, so that scaling rounds nothing
    x: Tensor  # (N, D) float32: the points, centred and scaled
    low: Tensor  # (N,) float32
    high: Tensor  # (N,) float32

    @classmethod
    def around(cls, centre: Tensor, points: Tensor, scale: float) -> "Cloud":
        """centre (D,) float64: any; the nearer to the points, the closer the bounds."""
        x = torch.empty(points.shape, dtype=torch.float32, device=points.device)
        norms = torch.empty(len(points), dtype=torch.float64, device=points.device)

        def fill(rows: slice) -> None:
            block = (points[rows] - centre).mul_(scale)  # float64
            x[rows] = block
            norms[rows] = block.square_().sum(dim=1)

        _in_threads(fill, [(rows,) for rows in _slices(len(points), CENTRED_ROWS)], points.device)
        return cls(points, scale, x, *(bound.float() for bound in _norm_bounds(norms, points.shape[1], EPS32)))

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, rows: slice | Tensor) -> "Cloud":
        return Cloud(self.points[rows], self.scale, self.x[rows], self.low[rows], self.high[rows])


@dataclass(frozen=True)
class Balls:
    """Balls around a cloud's points, surface included: x is inside that of y where |x - y|^2 <= limit_y.

    ``near`` and ``sure`` (N,) float32 decide by products: no unless near_y - 2 x.y <= -low_x, yes if sure_y - 2 x.y <= -high_x.
    """

    cloud: Cloud
    limits: Tensor  # (N,) float64
    near: Tensor
    sure: Tensor

    @classmethod
    def of(cls, cloud: Cloud, limits: Tensor) -> "Balls":
        slack = 8 * EPS32 * limits  # limits are rounded to float32 as well
        near, sure = cloud.low.double() - limits - slack, cloud.high.double() - limits + slack
        return cls(cloud, limits, near.float(), sure.float())

    def __getitem__(self, rows: slice) -> "Balls":
        return Balls(self.cloud[rows], self.limits[rows], self.near[rows], self.sure[rows])


class Search:
    """Which points of a cloud are inside some of the balls: by products, and at the end in float64 where those do not tell."""

    def __init__(self, cloud: Cloud, balls: Balls):
        self.cloud, self.balls = cloud, balls
        self.inside = torch.zeros(len(cloud), dtype=torch.bool, device=cloud.x.device)  # certainly
        self.is_near = self.inside.clone()  # perhaps
        self._lock = Lock()

    def look(self, rows: slice | Tensor, columns: slice | Tensor, products: Tensor) -> None:
        """products (n, m): -2 x.y of the cloud's ``rows`` and the balls' ``columns``."""
        near = self.balls.near[columns]
        least = (products + near).amin(dim=1)
        doubt = (self.balls.sure[columns] - near).amax() * (1 + 8 * EPS32)
        is_near, inside = least <= -self.cloud.low[rows], least <= -self.cloud.high[rows] - doubt
        with self._lock:
            self.is_near[rows] |= is_near
            self.inside[rows] |= inside

    def result(self) -> Tensor:
        """bool (N,)"""
        for rows in (self.is_near & ~self.inside).nonzero().squeeze(1).split(BLOCK_ROWS):
            self.inside[rows] = _inside_any(self.cloud[rows], self.balls)
        return self.inside


@contextlib.contextmanager
def _arithmetic() -> Iterator[None]:
    """Products of float32 in float32, for which the bounds are, not in TF32; and torch without threads of its own: they and
    numpy's would wait for each other, up to ten times as long as the work takes where the cores are busy."""
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)


@_arithmetic()
def membership(ref: Tensor, gen: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Which of gen (M, D) are inside some ball of ref (N, D), and which of ref inside some ball of gen: bool (M,), (N,)."""
    gen_balls, ref_balls = _balls(gen, ref, k)
    gen_search, ref_search = Search(gen_balls.cloud, ref_balls), Search(ref_balls.cloud, gen_balls)

    def look(i: slice, j: slice) -> None:
        for rows, columns in _undecided(i, gen_search.inside[i], j, ref_search.inside[j]):
            products = _products(gen_balls.cloud.x[rows], ref_balls.cloud.x[columns])
            gen_search.look(rows, columns, products)
            ref_search.look(columns, rows, products.T)

    _in_threads(look, _blocks(gen_balls.cloud, ref_balls.cloud), gen.device)
    return gen_search.result(), ref_search.result()


@_arithmetic()
def ball_counts(ref: Tensor, gen: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """In how many balls of ref (N, D) each of gen (M, D) is, int64 (M,), and whether each ball holds any, bool (N,)."""
    cloud, balls = _clouds(gen, ref)
    balls = Balls.of(balls, squared_radii(ref, k, cloud.scale))
    counts = torch.zeros(len(gen), dtype=torch.int64, device=gen.device)
    is_used = torch.zeros(len(ref), dtype=torch.bool, device=ref.device)
    for i, j, products in _product_blocks(cloud, balls.cloud):
        inside = products + balls.sure[j] <= -cloud.high[i, None]
        doubtful = (products.add_(balls.near[j]) <= -cloud.low[i, None]) & ~inside
        inside |= _decide(cloud[i], balls[j], doubtful)
        counts[i] += inside.sum(dim=1)
        is_used[j] |= inside.any(dim=0)
    return counts, is_used


def squared_radii(points: Tensor, k: int, scale: float) -> Tensor:
    """Squared distance (N,) of every point (N, D) to its k-th neighbour, times scale^2; the point itself is neighbour 0."""
    cloud = Cloud.around(_mean(points), points, scale)
    lower, neighbours = _nearest_by_lower_bound(cloud, min(k + 1 + SPARE_NEIGHBOURS, len(points)))
    upper = lower + (cloud.high - cloud.low)[:, None].double() + (cloud.high - cloud.low)[neighbours].double()
    # Of the k + 1 nearest, those are settled that can only be before, or only behind, the last.
    least, most = lower.kthvalue(k + 1, dim=1).values, upper.kthvalue(k + 1, dim=1).values
    doubtful = (upper >= least[:, None]) & (lower <= most[:, None])
    distances = torch.full_like(upper, torch.inf).masked_fill_(upper < least[:, None], -torch.inf)
    distances[doubtful] = _squared_distances(cloud, doubtful.nonzero()[:, 0], cloud, neighbours[doubtful])
    radii = distances.kthvalue(k + 1, dim=1).values
    # What was not kept is no nearer than the last that was.
    is_certain = (lower[:, -1] >= radii) | (radii == 0) | (lower.shape[1] == len(points))
    for rows in (~is_certain).nonzero().squeeze(1).split(BLOCK_ROWS):
        radii[rows] = _radii_below(cloud[rows], cloud, radii[rows], k)
    return radii


def _balls(gen: Tensor, ref: Tensor, k: int) -> tuple[Balls, Balls]:
    """Radii are found around each set's own mean, so that a set far from the other loses nothing."""
    scale = _common_scale(gen, ref)
    limits = squared_radii(gen, k, scale), squared_radii(ref, k, scale)
    return tuple(Balls.of(cloud, radii) for cloud, radii in zip(_clouds(gen, ref), limits, strict=True))


def _clouds(gen: Tensor, ref: Tensor) -> tuple[Cloud, Cloud]:
    centre, scale = (_mean(gen) + _mean(ref)) / 2, _common_scale(gen, ref)
    return Cloud.around(centre, gen, scale), Cloud.around(centre, ref, scale)


def _common_scale(*sets: Tensor) -> float:
    extent = max(float(points.amax()) for points in sets) - min(float(points.amin()) for points in sets)
    return math.ldexp(1.0, -math.frexp(extent)[1])


def _mean(points: Tensor) -> Tensor:
    """(D,) float64."""
    return sum(points[rows].sum(dim=0, dtype=torch.float64) for rows in _slices(len(points), CENTRED_ROWS)) / len(points)


def _norm_bounds(norms: Tensor, dim: int, eps: float) -> tuple[Tensor, Tensor]:
    """low and high of :class:`Cloud` for products of ``dim`` terms rounded to ``eps``; norms (N,): |x|^2."""
    error = (dim + 32) * eps * norms + UNDERFLOW * (norms > 0)  # products with 0 are exact
    return norms - error, norms + error


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _products(u: Tensor, v: Tensor) -> Tensor:
    """-2 u v^T (n, m) of float32 u (n, D) and v (m, D)."""
    if u.device.type != "cpu":
        return torch.mm(u, v.T).mul_(-2)
    return torch.from_numpy(u.numpy() @ v.numpy().T).mul_(-2)  # faster than torch's; of u with itself, half the work


def _blocks(a: Cloud, b: Cloud) -> list[tuple[slice, slice]]:
    """(rows of a, rows of b) until every pair has been named; of a cloud with itself, every unordered pair of blocks, those of
    a block with itself first."""
    blocks = [(i, j) for i in _slices(len(a), BLOCK_ROWS) for j in _slices(len(b), BLOCK_ROWS)]
    if a is not b:
        return blocks
    return sorted(((i, j) for i, j in blocks if i.start <= j.start), key=lambda block: block[0] != block[1])


def _product_blocks(a: Cloud, b: Cloud) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (rows of a, rows of b, -2 x.y (n, m) float32) of all :func:`_blocks`."""
    for i, j in _blocks(a, b):
        yield i, j, _products(a.x[i], b.x[j])


@functools.cache  # it looks through all libraries that are loaded
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


def _in_threads(work: Callable[..., None], items: Sequence[tuple], device: torch.device) -> None:
    """work(*item) for all items; on a CPU several at a time, on the threads that one product would have: what comes between
    the products then runs on all cores as well."""
    if device.type != "cpu" or len(items) < 2:
        for item in items:
            work(*item)
        return
    threads = max((library.num_threads for library in _blas().lib_controllers), default=1)
    workers = min(threads, MOST_WORKERS)
    with _blas().limit(limits=threads // workers), ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(work, *item) for item in items]:
            future.result()


def _undecided(i: slice, rows_decided: Tensor, j: slice, columns_decided: Tensor) -> list[tuple[slice | Tensor, ...]]:
    """The pairs of rows i with columns j of which not both are decided, as up to two products (rows, columns)."""
    open_rows, open_columns = ((~decided).nonzero().squeeze(1) for decided in (rows_decided, columns_decided))
    if len(open_rows) == len(rows_decided) or len(open_columns) == len(columns_decided):
        return [(i, j)]
    parts = (i.start + open_rows, j), (i.start + rows_decided.nonzero().squeeze(1), j.start + open_columns)
    return [part for part, size in zip(parts, (len(open_rows), len(open_columns)), strict=True) if size]


def _nearest_by_lower_bound(cloud: Cloud, count: int) -> tuple[Tensor, Tensor]:
    """The least lower bounds of squared distances of every point, ascending, float64 (N, count), and whose they are."""
    least = torch.full((len(cloud), count), torch.inf, device=cloud.x.device)
    whose = torch.zeros(len(cloud), count, dtype=torch.int64, device=cloud.x.device)

    lock = Lock()

    def merge(rows: slice, values: Tensor, indices: Tensor) -> None:
        with lock:
            values, indices = torch.cat([least[rows], values], dim=1), torch.cat([whose[rows], indices], dim=1)
            least[rows], order = values.topk(count, dim=1, largest=False)
            whose[rows] = indices.gather(1, order)

    def look(i: slice, j: slice) -> None:
        bounds = _products(cloud.x[i], cloud.x[j]).add_(cloud.low[j]).add_(cloud.low[i, None])
        if i == j:
            values, columns = bounds.topk(min(count, len(bounds)), dim=1, largest=False)
            merge(i, values, columns + j.start)
        else:  # few are less than the least so far: listing them is faster than topk
            is_less = (bounds < least[i, -1:]) | (bounds < least[j, -1])
            r, c = is_less.nonzero().unbind(dim=1)
            merge(i, *_by_row(r, bounds[r, c], c + j.start, len(bounds)))
            c, order = c.sort(stable=True)
            r = r[order]
            merge(j, *_by_row(c, bounds[r, c], r + i.start, len(bounds.T)))

    _in_threads(look, _blocks(cloud, cloud), cloud.x.device)
    return least.double(), whose


def _by_row(rows: Tensor, values: Tensor, indices: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Lists (P,), ascending in ``rows``, as tables (num_rows, most in a row), filled up with infinite values."""
    numbers = rows.bincount(minlength=num_rows)
    places = torch.arange(len(rows), device=rows.device) - (numbers.cumsum(0) - numbers)[rows]
    shape = num_rows, int(numbers.max())
    table, table_indices = values.new_full(shape, torch.inf), indices.new_zeros(shape)
    table[rows, places], table_indices[rows, places] = values, indices
    return table, table_indices


def _radii_below(part: Cloud, cloud: Cloud, limits: Tensor, k: int) -> Tensor:
    """:func:`squared_radii` of ``part``, some of ``cloud``'s points; they are known to be no more than ``limits`` (n,)."""
    nearest = torch.full((len(part), k + 1), torch.inf, dtype=torch.float64, device=limits.device)
    for _, j, products in _product_blocks(part, cloud):
        bounds = products.add_(cloud.low[j]).add_(part.low[:, None])
        columns = cloud[j]
        doubtful = bounds <= ((1 + 8 * EPS32) * limits).float()[:, None]
        for rows, crowd in _crowds(doubtful):
            lower, upper = _close_bounds(part[rows], columns[crowd])
            if len(crowd) > k:
                limits[rows] = torch.minimum(limits[rows], upper.kthvalue(k + 1, dim=1).values)
            doubtful[rows[:, None], crowd] &= lower <= limits[rows, None]
        distances = torch.full(doubtful.shape, torch.inf, dtype=torch.float64, device=limits.device)
        distances[doubtful] = _squared_distances(part, doubtful.nonzero()[:, 0], columns, doubtful.nonzero()[:, 1])
        found = distances.topk(min(k + 1, len(columns)), dim=1, largest=False).values
        nearest = torch.cat([nearest, found], dim=1).topk(k + 1, dim=1, largest=False).values
        limits = torch.minimum(limits, nearest[:, -1])
    return nearest[:, -1]


def _inside_any(part: Cloud, balls: Balls) -> Tensor:
    """Whether each point of ``part`` is inside some ball, bool (n,), decided in float64."""
    inside = torch.zeros(len(part), dtype=torch.bool, device=part.x.device)
    for _, j, products in _product_blocks(part, balls.cloud):
        block = balls[j]
        bounds = products.add_(block.near)
        doubtful = (bounds <= -part.low[:, None]) & ~inside[:, None]
        # One ball is enough: the likeliest first.
        likeliest = torch.zeros_like(doubtful).scatter_(1, bounds.argmin(dim=1, keepdim=True), True) & doubtful
        inside |= _decide(part, block, likeliest).any(dim=1)
        inside |= _decide(part, block, doubtful & ~likeliest & ~inside[:, None]).any(dim=1)
    return inside


def _decide(part: Cloud, balls: Balls, doubtful: Tensor) -> Tensor:
    """Which of the doubtful pairs (n, m) are a point and a ball that it is inside of, bool (n, m); ``doubtful`` is used up."""
    inside = torch.zeros_like(doubtful)
    for rows, crowd in _crowds(doubtful):
        lower, upper = _close_bounds(part[rows], balls.cloud[crowd])
        pairs = rows[:, None], crowd
        inside[pairs] |= doubtful[pairs] & (upper <= balls.limits[crowd])
        doubtful[pairs] &= (lower <= balls.limits[crowd]) & (upper > balls.limits[crowd])
    i, j = doubtful.nonzero().unbind(dim=1)
    inside[i, j] = _squared_distances(part, i, balls.cloud, j) <= balls.limits[j]
    return inside


def _crowds(doubtful: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield indices (rows, columns) of parts of ``doubtful`` (n, m), until no row has more than ``FEW`` pairs left.

    Rows with many doubtful pairs are in a cluster, narrow against its distance to the centre. Each part is about one cluster.
    """
    left = doubtful.clone()
    while left.numel():
        numbers = left.sum(dim=1)
        most = int(numbers.argmax())
        if numbers[most] <= FEW:
            return
        columns = left[most].nonzero().squeeze(1)
        rows = left[:, columns].any(dim=1).nonzero().squeeze(1)
        yield rows, columns
        left[rows[:, None], columns] = False


def _close_bounds(a: Cloud, b: Cloud) -> tuple[Tensor, Tensor]:
    """Bounds (n, m) of squared distances by float64 products around a point of ``b``, whose copies are at 0 exactly."""
    centre = b.points[0].double()
    u, v = ((cloud.points.double() - centre) * cloud.scale for cloud in (a, b))
    (low_u, high_u), (low_v, high_v) = (_norm_bounds(x.square().sum(dim=1), x.shape[1], EPS64) for x in (u, v))
    products = -2 * u @ v.T
    return products + low_u[:, None] + low_v, products + high_u[:, None] + high_v


def _squared_distances(a: Cloud, i: Tensor, b: Cloud, j: Tensor) -> Tensor:
    """|a_i - b_j|^2, float64 (pairs,), from differences: the same bits for (i, j) and (j, i), in any batch, on any device."""
    distances = torch.empty(len(i), dtype=torch.float64, device=i.device)

    def fill(pairs: slice) -> None:
        differences = a.points[i[pairs]].double().sub_(b.points[j[pairs]])
        distances[pairs] = _row_sums(differences.square_())

    step = max(1, PAIR_ELEMENTS // a.points.shape[1])
    _in_threads(fill, [(pairs,) for pairs in _slices(len(i), step)], i.device)
    return distances.mul_(a.scale**2)


def _row_sums(x: Tensor) -> Tensor:
    """(n, D) -> (n,), by halves: the order of a library's own sum depends on shape, threads and device. ``x`` is used up."""
    while x.shape[1] > 1:
        half = (x.shape[1] + 1) // 2
        x[:, : x.shape[1] - half] += x[:, half:]
        x = x[:, :half]
    return x[:, 0]
