"""Whether bf16 trains as fp32 does: loss curves of EDT-Ti on scikit-learn's digits, three seeds of each, by the training script
itself, not compiled.

    python -m benchmarks.curves

Two runs of one seed see the same images, timesteps, noise and masks, so that their difference is the precision's; the spread
between seeds says how large a difference means nothing. Writes a section of RESULTS.md and curves.png.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import extract_features
from benchmarks.report import RESULTS, environment, markdown, number, write_section
from examples.digits import IMAGE_SIZE, prepare
from runtime import cli
from runtime.figures import save_figure
from training.checkpoint import METRICS

TITLE = "Training curves: bf16 against fp32"
PRECISIONS = ("fp32", "bf16")
LOG_EVERY = 10
PARTS = 5  # of the training, each with a row of its own
ROOT = Path(__file__).resolve().parent.parent
# The demo's recipe: so short a run wants uniform timesteps and no min-SNR weight.
RECIPE = (
    "--model EDT-Ti/2 --epochs 100000 --global-batch-size 32 --init-lr 5e-3 --final-lr 1e-4 --ema-decay 0.995 "
    f"--timestep-sampler uniform --min-snr-gamma 0 --log-every {LOG_EVERY} --ckpt-every 1000000"
).split()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.ArgumentParser(__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=cli.positive_int, default=500, help=f"a multiple of {PARTS * LOG_EVERY}")
    parser.add_argument("--seeds", type=cli.positive_int, default=3, help="how many of each precision, at least 2")
    parser.add_argument(
        "--out", type=Path, help="the section is written there, curves.png beside it (default: benchmarks/RESULTS.md)"
    )
    args = parser.parse_args(argv)
    args.out = args.out or RESULTS
    if args.steps % (PARTS * LOG_EVERY):
        parser.error(f"--steps {args.steps} must be a multiple of {PARTS * LOG_EVERY}: {PARTS} parts of whole log lines")
    if args.seeds < 2:
        parser.error(f"--seeds {args.seeds} must be at least 2: one seed has no spread")
    return args


def run(features: Path, results: Path, steps: int, seed: int, precision: str) -> np.ndarray:
    """The losses of a training run, means of LOG_EVERY steps."""
    flags = ["--feature-path", features, "--results-dir", results, "--max-steps", steps, "--lr-decay-steps", steps]
    command = [sys.executable, "train_mask_adan.py", *RECIPE, *flags, "--seed", seed, "--precision", precision]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"training with --precision {precision} --seed {seed} failed: {done.stderr.strip()[-500:]}")
    (log,) = results.glob(f"*/{METRICS}")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    if records[-1]["skipped_steps"]:
        raise ValueError(f"--precision {precision} --seed {seed} skipped {records[-1]['skipped_steps']} steps: not finite")
    return np.array([record["loss"] for record in records])


def compare(fp32: np.ndarray, bf16: np.ndarray) -> list[dict[str, float]]:
    """Losses (seeds, points) -> for each of PARTS parts of the training, then for all of it, of the parts' means:

    fp32, bf16: over the seeds. difference: bf16 - fp32, the mean of the pairs. error: its standard error. spread: the standard
    deviation between the seeds of one precision, pooled.
    """
    rows = []
    for part in [*np.split(np.arange(fp32.shape[1]), PARTS), np.arange(fp32.shape[1])]:
        a, b = fp32[:, part].mean(1), bf16[:, part].mean(1)
        rows.append(
            {
                "fp32": a.mean(),
                "bf16": b.mean(),
                "difference": (b - a).mean(),
                "error": (b - a).std(ddof=1) / len(a) ** 0.5,
                "spread": ((a.var(ddof=1) + b.var(ddof=1)) / 2) ** 0.5,
            }
        )
    return rows


def table(rows: Sequence[dict[str, float]], steps: int) -> str:
    a_part = steps // PARTS
    names = [f"steps {i * a_part + 1}..{(i + 1) * a_part}" for i in range(PARTS)] + ["all steps"]
    heading = ["mean loss", "fp32", "bf16", "bf16 - fp32", "its standard error", "spread between seeds", "difference / spread"]
    return markdown(
        [heading]
        + [
            [name, *(f"{row[key]:.5f}" for key in ("fp32", "bf16", "difference", "error", "spread"))]
            + [number(abs(row["difference"]) / row["spread"])]
            for name, row in zip(names, rows, strict=True)
        ]
    )


def draw(fp32: np.ndarray, bf16: np.ndarray, path: Path) -> None:
    """The curves, and below the difference of each pair beside the seeds' own differences from their mean."""
    from matplotlib.figure import Figure  # imported here, as in training.logging

    steps = LOG_EVERY * np.arange(1, fp32.shape[1] + 1)
    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for losses, color, name in ((fp32, "tab:blue", "fp32"), (bf16, "tab:orange", "bf16")):
        top.plot(steps, losses.T, color=color, alpha=0.6, linewidth=1, label=[name, *[None] * (len(losses) - 1)])
    bottom.plot(
        steps,
        (fp32 - fp32.mean(0)).T,
        color="0.7",
        linewidth=1,
        label=["a seed - the mean seed, fp32", *[None] * (len(fp32) - 1)],
    )
    bottom.plot(
        steps, (bf16 - fp32).T, color="tab:red", linewidth=1, label=["bf16 - fp32, one seed", *[None] * (len(fp32) - 1)]
    )
    top.set(ylabel="loss", yscale="log")
    bottom.set(xlabel="step", ylabel="difference of losses")
    for axes in (top, bottom):
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    save_figure(figure, path, dpi=120)


def describe(rows: Sequence[dict[str, float]], args: argparse.Namespace) -> str:
    whole = rows[-1]
    within = abs(whole["difference"]) <= whole["spread"]
    return (
        f"EDT-Ti/2 on the digits of `make demo`, {args.steps} steps of 32 images, masked, Adan, seeds 0..{args.seeds - 1}, by "
        "`train_mask_adan.py --precision`, not compiled. Runs of one seed see the same images, timesteps, noise and masks.\n\n"
        f"{environment(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))}\n\n{table(rows, args.steps)}\n\n"
        f"Over all steps bf16's loss differs by {100 * whole['difference'] / whole['fp32']:+.3f} %, which is "
        f"{'within' if within else 'MORE THAN'} the spread between seeds, {100 * whole['spread'] / whole['fp32']:.3f} %.\n\n"
        "![curves](curves.png)"
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    losses = {precision: [] for precision in PRECISIONS}
    with tempfile.TemporaryDirectory() as folder:
        digits, features = Path(folder, "digits"), Path(folder, "features")
        prepare(digits)
        flags = ["--data-path", digits / "train", "--features-path", features, "--vae", "pixels", "--image-size", IMAGE_SIZE]
        extract_features.main(list(map(str, flags)))
        for seed in range(args.seeds):
            for precision in PRECISIONS:
                curve = run(features, Path(folder, f"{precision}-{seed}"), args.steps, seed, precision)
                print(f"seed {seed} {precision}: loss {curve[0]:.4f} -> {curve[-len(curve) // PARTS :].mean():.4f}", flush=True)
                losses[precision].append(curve)
    fp32, bf16 = (np.stack(losses[precision]) for precision in PRECISIONS)
    rows = compare(fp32, bf16)
    draw(fp32, bf16, args.out.with_name("curves.png"))
    write_section(TITLE, describe(rows, args), args.out)
    print(f"\n{table(rows, args.steps)}\n\n{args.out}, {args.out.with_name('curves.png')}")


if __name__ == "__main__":
    cli.run(main)
