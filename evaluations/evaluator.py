"""Compare generated images with a reference batch: inception score, FID, sFID, precision and recall, as ADM prints them.

    python evaluations/evaluator.py REF.npz SAMPLES.npz
    torchrun --nproc_per_node=8 evaluations/evaluator.py REF.npz SAMPLES.npz --cache ~/.cache/edt --json metrics.json

docs/evaluation.md explains the protocol, the weights and the flags.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import fields

try:
    from evaluations.batches import NEIGHBOUR, check_pair, note_other_features, read_labels
    from evaluations.extraction import load_reference, load_samples
    from evaluations.features import INCEPTION, add_features_arguments, load_extractor
    from evaluations.scores import DENSITY_NEIGHBOUR, Requests, compute, lines, products_device
    from runtime import cli, draws
    from runtime.distributed import leave_group, start, together
    from runtime.files import check_writable, write_json
except ModuleNotFoundError as error:
    if error.name not in ("evaluations", "runtime"):
        raise
    raise SystemExit("error: install the repository first: pip install -e .") from None


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument(
        "ref", metavar="REF.npz", help="reference batch: uint8 images arr_0 (N, H, W, 3) and/or mu, sigma, mu_s, sigma_s"
    )
    parser.add_argument("samples", metavar="SAMPLES.npz", help="generated images: uint8 arr_0 (M, H, W, 3)")
    add_features_arguments(parser)
    parser.add_argument("--split-size", type=cli.positive_int, default=5000, help="images per split of the inception score")
    parser.add_argument(
        "--pr-half",
        action=cli.BooleanFlag,
        help="precision and recall in ADM's float16 arithmetic instead of exactly: shifts the third digit, "
        "for comparison with numbers of ADM's script",
    )
    parser.add_argument(
        "--num-samples", type=cli.positive_int, help="measure so many of the samples, drawn without replacement; None: all"
    )
    parser.add_argument("--seed", type=cli.seed, default=0, help="of --num-samples, --kid and --bootstrap")
    parser.add_argument("--kid", action=cli.BooleanFlag, help="also the kernel distance (KID): mean and deviation over subsets")
    parser.add_argument("--kid-subsets", type=cli.positive_int, default=100, help="how many subsets")
    parser.add_argument("--kid-subset-size", type=cli.number(int, 2), default=1000, help="images of a subset")
    parser.add_argument(
        "--density-coverage", action=cli.BooleanFlag, help="also density and coverage (Naeem et al. 2020), k = 5"
    )
    parser.add_argument(
        "--bootstrap",
        metavar="RESAMPLES",
        type=cli.non_negative_int,
        default=0,
        help="also FID's 95 %% confidence interval, from so many resamples of the samples (50 are plenty); 0: no interval",
    )
    parser.add_argument("--per-class", action=cli.BooleanFlag, help="also the precision of each class; needs labels arr_1")
    parser.add_argument("--class-balance", action=cli.BooleanFlag, help="also how evenly the classes are drawn; needs arr_1")
    parser.add_argument(
        "--num-classes", type=cli.positive_int, help="of --class-balance; None: as many as the largest label tells"
    )
    parser.add_argument("--json", metavar="FILE", help="also write everything to this file; null where a metric is not defined")
    parser.add_argument("--cache", metavar="DIR", help="keep the reference's features and statistics there, by content")
    args = parser.parse_args(argv)
    if args.num_classes and not args.class_balance:
        parser.error(f"--num-classes {args.num_classes} is of --class-balance: add that, or leave it out")
    if args.bootstrap == 1:
        parser.error("--bootstrap 1: a deviation needs at least 2 resamples, 50 are plenty")
    return args


def main(argv: Sequence[str] | None = None) -> dict | None:
    """Print the metrics; the main process returns what ``--json`` writes, the others None."""
    args = parse_args(argv)
    state = start()
    with together():
        ref_shape, samples_shape = check_pair(args.ref, args.samples)
        rows = choose_rows(samples_shape[0], args)
        check_requests(args, ref_shape, samples_shape, len(rows))
        labels = read_labels(args.samples, samples_shape[0], args.num_classes)[rows] if needs_labels(args) else None
        for target in (args.json, args.cache and os.path.join(args.cache, "file")):
            if target and state.is_main_process:
                check_writable(target)
        note_other_features(args.ref, "--features", args.features)
    extractor = load_extractor(args, state)
    ref = load_reference(args.ref, ref_shape[0] if ref_shape else 0, extractor, args.batch_size, state, args.cache)
    samples = load_samples(args.samples, rows, extractor, args.batch_size, state)
    leave_group()  # what follows may take the main process minutes, and nobody should have to wait for it
    if not state.is_main_process:
        return None
    requests = Requests(**{field.name: getattr(args, field.name) for field in fields(Requests)})
    scores, reasons = compute(ref, samples, labels, requests, products_device(state))
    result = scores | {
        "features": args.features,
        "fingerprint": extractor.fingerprint,
        "pr_half": args.pr_half,
        "split_size": args.split_size,
        "ref": args.ref,
        "samples": args.samples,
        "num_ref": ref.num_images,
        "num_samples": samples.num_images,
        "constant_images": {"ref": list(ref.constant), "samples": list(samples.constant)},
    }
    if args.json:  # before printing, which fails where nobody reads any more
        write_json(result, args.json)
    for line in lines(scores, reasons, "" if extractor.name == INCEPTION else f" ({extractor.name})"):
        print(line, flush=True)
    return result


def needs_labels(args: argparse.Namespace) -> bool:
    return args.per_class or args.class_balance


def check_requests(
    args: argparse.Namespace, ref_shape: tuple[int, ...] | None, samples_shape: tuple[int, ...], num_samples: int
) -> None:
    """Raise ValueError for what these files cannot give, before an hour is spent on features."""
    if ref_shape is None:
        for flag in ("kid", "density_coverage", "per_class"):
            if getattr(args, flag):
                raise ValueError(
                    f"--{flag.replace('_', '-')} needs the reference's images, {args.ref} holds statistics only: leave it out"
                )
        return
    if args.features == "pixels" and ref_shape[1:] != samples_shape[1:]:
        raise ValueError(
            f"{args.ref} holds images of (H, W, C) {ref_shape[1:]}, {args.samples} of {samples_shape[1:]}: "
            "--features pixels compares images of one size, make both alike"
        )
    smaller = min(ref_shape[0], num_samples)
    if args.density_coverage and smaller <= DENSITY_NEIGHBOUR:
        raise ValueError(f"--density-coverage: the smaller of the two sets has {smaller}, it needs {DENSITY_NEIGHBOUR + 1}")
    if args.kid and args.kid_subset_size > smaller:
        raise ValueError(
            f"--kid-subset-size {args.kid_subset_size}: the smaller of the two sets has {smaller}, pass at most that"
        )


def choose_rows(available: int, args: argparse.Namespace) -> Sequence[int]:
    """Positions, ascending, of the samples to measure."""
    if args.num_samples is None:
        return range(available)
    if not NEIGHBOUR < args.num_samples <= available:
        raise ValueError(
            f"--num-samples {args.num_samples}: {args.samples} holds {available} images, pass {NEIGHBOUR + 1} to {available}"
        )
    return draws.subset(args.seed, available, args.num_samples).tolist()


if __name__ == "__main__":
    cli.run(main)
