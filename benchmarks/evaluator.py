"""Time the Frechet distance and precision and recall against plain formulations, and write the table to benchmarks/RESULTS.md.

python -m benchmarks.evaluator [--images 10000] [--features 2048] [--rounds 2] [--threads 2] [--quick]
"""

import contextlib
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from threadpoolctl import threadpool_limits

from benchmarks.inception import plain_inception, save_random_inception
from benchmarks.report import device_name, environment, table, write_section
from benchmarks.timing import CPU, Case, Result, measure
from evaluations.inception import Inception
from evaluations.metrics import frechet_distance, mean_covariance, precision_recall
from runtime import cli

NEIGHBOUR = 3
LATENTS = 512  # of the features' make-up
QUICK = {"images": 400, "singular_images": 40, "features": 64, "inception_images": 2}

CAPTION = """The cases take turns in shuffled order. Time / plain: the median of the rounds' ratios to the plain formulation:
numpy.cov and the trace of scipy.linalg.sqrtm(sigma1 @ sigma2); whole matrices of distances, one at a time, built in place, and
numpy.partition for the neighbour, in float64 or, where it says so, float32. Peak MB: the memory that one call adds to what is
held before, features included. Inception: torch-fidelity's network as it is. Features: non-negative, correlated, in clusters,
half of them zero, as Inception's pool. Where covariances are singular, the difference is sqrtm's: tests/test_frechet.py has
the closed form."""


@dataclass(frozen=True)
class Comparison:
    """What is timed: two ways to the same numbers. run, plain: compute them."""

    name: str
    run: Callable[[], Sequence[float]]
    plain: Callable[[], Sequence[float]]
    target: float | None = None  # how many times faster
    memory_target: float | None = None  # share of the plain formulation's peak
    harder: Callable[[], Sequence[float]] | None = None  # the plain formulation in float32, where there is one

    def cases(self) -> list[Case]:
        baseline = f"{self.name}, plain"
        cases = [Case(baseline, self.plain), Case(self.name, self.run, baseline=baseline)]
        if self.harder:
            cases.insert(1, Case(f"{baseline} float32", self.harder, baseline=baseline))
        return cases


def parse(argv: Sequence[str] | None):
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--images", type=cli.positive_int, default=10_000, help="in each of the two sets")
    parser.add_argument("--singular-images", type=cli.positive_int, default=1000, help="where covariances are to be singular")
    parser.add_argument("--features", type=cli.positive_int, default=2048, help="of an image")
    parser.add_argument("--inception-images", type=cli.positive_int, default=16, help="of 256 x 256 pixels, through Inception")
    parser.add_argument("--rounds", type=cli.positive_int, default=2, help="in which every case is timed once")
    parser.add_argument("--threads", type=cli.positive_int, help="of the CPU (default: as the libraries choose)")
    parser.add_argument("--quick", action=cli.BooleanFlag, help="small sizes, to see that it runs; nothing is written")
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(QUICK)
    return args


def pool_features(num_images: int, num_features: int, seed: int, shift: float) -> np.ndarray:
    """Random features (N, D) float32 like Inception's pool: non-negative, correlated, with a spectrum that decays by a power.

    Images belong to 1000 classes. shift: how far off the set's distribution is, 0 being the reference's.
    """
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    decay = np.arange(1, LATENTS + 1, dtype=np.float32)[:, None] ** -0.6
    directions = 0.25 * decay * fixed.standard_normal((LATENTS, num_features), dtype=np.float32)
    bias = 0.2 * fixed.standard_normal(num_features, dtype=np.float32) + shift
    classes = fixed.standard_normal((1000, LATENTS), dtype=np.float32)
    latents = classes[rng.integers(1000, size=num_images)] + rng.standard_normal((num_images, LATENTS), dtype=np.float32)
    noise = 0.1 * rng.standard_normal((num_images, num_features), dtype=np.float32)
    return np.maximum((0.7 - shift) * latents @ directions + bias + noise, 0)


def plain_frechet(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real)


def plain_statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(axis=0, dtype=np.float64), np.cov(features, rowvar=False, dtype=np.float64)


def plain_precision_recall(ref: np.ndarray, gen: np.ndarray, dtype: type) -> tuple[float, float]:
    ref, gen = ref.astype(dtype), gen.astype(dtype)

    def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        squares = x @ y.T
        squares *= -2
        squares += (x**2).sum(axis=1)[:, None]
        squares += (y**2).sum(axis=1)
        return np.maximum(squares, 0, out=squares)

    def radii(points: np.ndarray) -> np.ndarray:
        return np.partition(distances(points, points), NEIGHBOUR, axis=1)[:, NEIGHBOUR]

    ref_radii, gen_radii, between = radii(ref), radii(gen), distances(gen, ref)
    return float((between <= ref_radii).any(axis=1).mean()), float((between <= gen_radii[:, None]).any(axis=0).mean())


def inception(num_images: int) -> Comparison:
    images = np.random.default_rng(0).integers(0, 256, (num_images, 256, 256, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(None):
        save_random_inception(f"{folder}/random.pth")
        plain, ours = plain_inception(f"{folder}/random.pth"), Inception(CPU, f"{folder}/random.pth")
    return Comparison(
        f"Inception, {num_images} images",
        lambda: ours(images).pool.mean(axis=1),
        lambda: plain(images).mean(axis=1),
    )


def comparisons(args) -> list[Comparison]:
    ref, gen = (pool_features(args.images, args.features, seed, shift) for seed, shift in ((1, 0), (2, 0.05)))
    few = ref[: args.singular_images], gen[: args.singular_images]
    whole, singular = ([*plain_statistics(a), *plain_statistics(b)] for a, b in ((ref, gen), few))
    return [
        inception(args.inception_images),
        Comparison("Frechet", lambda: [frechet_distance(*whole)], lambda: [plain_frechet(*whole)], target=6),
        Comparison(
            "Frechet from features",
            lambda: [frechet_distance(*mean_covariance(ref), *mean_covariance(gen))],
            lambda: [plain_frechet(*plain_statistics(ref), *plain_statistics(gen))],
            target=6,
        ),
        Comparison("Frechet, singular", lambda: [frechet_distance(*singular)], lambda: [plain_frechet(*singular)], target=2.5),
        Comparison(
            "precision and recall",
            lambda: precision_recall(ref, gen, NEIGHBOUR),
            lambda: plain_precision_recall(ref, gen, np.float64),
            target=3,
            memory_target=1 / 4,
            harder=lambda: plain_precision_recall(ref, gen, np.float32),
        ),
    ]


class Values:
    """Makes cases remember what they computed, so that agreement costs no further call."""

    def __init__(self):
        self.by_name: dict[str, np.ndarray] = {}

    def recording(self, case: Case) -> Case:
        def run() -> None:
            self.by_name[case.name] = np.asarray(case.run())

        return Case(case.name, run, baseline=case.baseline)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    with threadpool_limits(args.threads):
        text = compare(args)
    print(text)
    if not args.quick:
        write_section(f"benchmarks.evaluator on {device_name(CPU)}", text)


def compare(args) -> str:
    values, results, compared = Values(), [], comparisons(args)
    # Memory is what precision and recall are about; for the distances it would be a third of the benchmark's time.
    for needs_memory in (False, True):
        cases = [case for item in compared if bool(item.memory_target) == needs_memory for case in item.cases()]
        recorded = [values.recording(case) for case in cases]
        results += measure(recorded, repeats=args.rounds, warmup=0, memory=needs_memory)
    by_name = {result.name: result for result in results}
    what = f"""{args.rounds} rounds; {args.images} images of {args.features} features in each set, {args.singular_images} where
covariances are singular. {CAPTION}"""
    parts = (
        f"{environment(CPU)}, numpy {np.__version__}, scipy {scipy.__version__}.",
        textwrap.fill(what, 128),
        table(results, item="call"),
        "\n".join(line for item in compared for line in verdicts(item, by_name, values.by_name)),
    )
    return "\n\n".join(parts)


def verdicts(item: Comparison, results: dict[str, Result], values: dict[str, np.ndarray]) -> list[str]:
    """Targets, what was reached, and whether the numbers are the same, as lines of a list."""
    lines, ours = [], results[item.name]
    for case in item.cases():
        if case.name == item.name:
            continue
        plain, kind = results[case.name], case.name.removeprefix(f"{item.name}, ")
        pairs = zip(plain.seconds, ours.seconds, strict=True)
        faster = np.median([theirs / own for theirs, own in pairs])
        difference = np.max(np.abs(values[item.name] - values[case.name]) / np.abs(values[case.name]))
        is_harder = case.name != f"{item.name}, plain"
        line = f"- {item.name}: {faster:.1f} times as fast as {kind}"
        line += "" if is_harder or item.target is None else f" (target {item.target:g})"
        if ours.peak_bytes is not None:
            line += f", {ours.peak_bytes / plain.peak_bytes:.2f} of its memory"
            line += "" if is_harder else f" (target {item.memory_target:g})"
        lines.append(f"{line}; relative difference {difference:.1g}")
    return lines


if __name__ == "__main__":
    cli.run(main)
