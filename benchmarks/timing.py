"""The one harness of the benchmarks: cases that are to be compared take turns, so that a machine that gets faster, slower or
busier does so for all of them.

    results = measure([Case("plain", plain), Case("fused", fused, baseline="plain", products=record_products(plain))])

Every round times each case once, in a shuffled order, and so each matrix product inside the cases: the product rate that a
case is held against is this machine's, at the case's own shapes and precision, in the same minutes.
"""

import contextlib
import ctypes
import dataclasses
import gc
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch

from benchmarks.products import Product, product_calls, total_flops

CPU = torch.device("cpu")
MIN_ROUNDS = 3  # fewer say nothing about the spread: a time budget does not cut below
MIN_PRODUCT_TIMINGS = 15
# On CUDA a product is repeated up to so many FLOPs a timing, some 0.3 ms: well above launching a kernel and waiting for it.
CUDA_FLOPS_PER_TIMING = 1e11
MAX_LOOPS = 200
SAMPLING_SECONDS = 0.001


@dataclass(frozen=True)
class Case:
    """One way to do a piece of work. run: does it once; what is compiled is compiled in the warm-up.

    items: images (or whatever is counted) in one call. baseline: the name of the case this one's time is divided by.
    products: the matrix products the work needs, as :func:`benchmarks.products.record_products` finds them in its plain
    formulation, so that what an implementation adds on top does not count as achieved; None for work of another kind.
    """

    name: str
    run: Callable[[], object]
    items: int = 1
    baseline: str | None = None
    products: Counter[Product] | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured of a case. Times are of one call."""

    name: str
    items: int
    seconds: tuple[float, ...]  # one for each round
    ratio: float | None = None  # time_ratio to the baseline
    flops: int | None = None
    product_seconds: float | None = None  # what the call's matrix products take on their own: the sum of their medians
    share_of_product_rate: float | None = None  # of the time, that the products on their own would have taken: see _result
    peak_bytes: int | None = None  # see peak_memory

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def min(self) -> float:
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """The interquartile range over the median; 0 for a single round."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median

    @property
    def ms_per_item(self) -> float:
        return 1e3 * self.median / self.items

    @property
    def gflops_per_second(self) -> float | None:
        return None if self.flops is None else self.flops / self.median / 1e9

    @property
    def product_gflops_per_second(self) -> float | None:
        """This machine's rate at the case's product shapes, each weighted by its share of the FLOPs."""
        return None if self.product_seconds is None else self.flops / self.product_seconds / 1e9


def time_ratio(result: Result, baseline: Result) -> float:
    """Time per item over the baseline's: the median of the ratios within each round, which drift hardly touches."""
    return statistics.median(round_ratios(result, baseline))


def round_ratios(result: Result, baseline: Result) -> list[float]:
    """Time per item over the baseline's, in each round."""
    rounds = zip(result.seconds, baseline.seconds, strict=True)
    return [own / other * baseline.items / result.items for own, other in rounds]


def measure(
    cases: Sequence[Case],
    *,
    repeats: int = 15,
    warmup: int = 2,
    budget_seconds: float | None = None,
    min_rounds: int = MIN_ROUNDS,
    device: torch.device = CPU,
    memory: bool = False,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Result]:
    """Time the cases in ``repeats`` rounds after ``warmup`` rounds that do not count.

    budget_seconds: begin no further round after so long, warm-up not counted (None: no limit); ``min_rounds`` of the repeats
    are done in any case, and matrix products timed ``MIN_PRODUCT_TIMINGS`` times. memory: also call each case once under
    :func:`peak_memory`. seed: of the rounds' order. Raises ValueError for two cases of one name, a baseline that is none of
    the cases, or fewer than 1 repeat.
    """
    _check(cases, repeats)
    timers = _timers(cases, device, clock)
    for _ in range(warmup):
        for timer in timers.values():
            timer()
    seconds: dict[str | Product, list[float]] = {key: [] for key in timers}
    shuffled, began = random.Random(seed), clock()
    for completed in range(repeats):
        if budget_seconds is not None and completed >= min_rounds and clock() - began >= budget_seconds:
            break
        for key in shuffled.sample(list(timers), len(timers)):
            seconds[key].append(timers[key]())
    for key in timers:
        while isinstance(key, Product) and len(seconds[key]) < MIN_PRODUCT_TIMINGS:
            seconds[key].append(timers[key]())
    for key in timers:
        if isinstance(key, Product) and key.packed:
            seconds[key] = min(seconds[key], seconds[key._replace(packed=False)], key=statistics.median)
    results = {case.name: _result(case, seconds) for case in cases}
    for case in cases:
        added = {"peak_bytes": peak_memory(case.run, device)} if memory else {}
        if case.baseline is not None:
            added["ratio"] = time_ratio(results[case.name], results[case.baseline])
        results[case.name] = dataclasses.replace(results[case.name], **added)
    return list(results.values())


def _check(cases: Sequence[Case], repeats: int) -> None:
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        raise ValueError(f"two cases have the same name: {', '.join(names)}")
    for case in cases:
        if case.baseline is not None and case.baseline not in names:
            raise ValueError(f"the baseline {case.baseline!r} of {case.name!r} is none of the cases {', '.join(names)}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")


def _timers(
    cases: Sequence[Case], device: torch.device, clock: Callable[[], float]
) -> dict[str | Product, Callable[[], float]]:
    """For each case, by its name, and each product inside the cases: a function that does it and returns its seconds."""

    def timer(call: Callable[[], object], loops: int) -> Callable[[], float]:
        def time_it() -> float:
            synchronize(device)
            began = clock()
            for _ in range(loops):
                call()
            synchronize(device)
            return (clock() - began) / loops

        return time_it

    timers: dict[str | Product, Callable[[], float]] = {case.name: timer(case.run, 1) for case in cases}
    inside = [product for case in cases for product in case.products or ()]
    inside += [product._replace(packed=False) for product in inside]  # packing beforehand is not always faster
    inside = dict.fromkeys(inside)  # a set, in a fixed order
    for product, call in product_calls(inside, device).items():
        loops = min(max(int(CUDA_FLOPS_PER_TIMING / product.flops), 1), MAX_LOOPS) if device.type == "cuda" else 1
        timers[product] = timer(call, loops)
    return timers


def _result(case: Case, seconds: dict[str | Product, list[float]]) -> Result:
    """The share of the product rate is, as the ratio to a baseline, the median over the rounds: on a busy machine two medians
    may come from different rounds."""
    result = Result(name=case.name, items=case.items, seconds=tuple(seconds[case.name]))
    if case.products is None:
        return result
    shares = [
        sum(count * seconds[product][i] for product, count in case.products.items()) / own
        for i, own in enumerate(result.seconds)
    ]
    return dataclasses.replace(
        result,
        flops=total_flops(case.products),
        product_seconds=sum(count * statistics.median(seconds[product]) for product, count in case.products.items()),
        share_of_product_rate=statistics.median(shares),
    )


def synchronize(device: torch.device) -> None:
    """Wait for what was launched on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(run: Callable[[], object], device: torch.device = CPU) -> int:
    """The bytes that one call needs at its worst moment, on top of what is held before it (weights, inputs, earlier caches).

    CUDA: the peak of torch's allocator. Elsewhere: the growth of the process's resident set, looked at every millisecond from
    a thread, after unused memory was handed back to the system; a shorter peak can be missed, and pages that the system
    library keeps for itself are not seen to grow.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLING_SECONDS):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        kept = run()  # alive until the last look below
        peak_at_end = process.memory_info().rss
        del kept
    finally:
        done.set()
        watcher.join()
    return max(peak, peak_at_end) - before
