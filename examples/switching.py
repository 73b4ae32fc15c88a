"""The verdict on step-wise sampling in the mediators' demo.

python -m examples.switching ...     measure step-wise samples of the digits, and those of the last model alone, and count what
both cost; prints tables, writes metrics_mediators.json and samples_switching.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from examples.digits import measure, print_table, quality_rows
from models.checkpoints import read_checkpoint
from models.macs import multiply_accumulates
from runtime import cli
from runtime.files import write_json
from sampling.grids import save_grid

PER_CLASS = 10  # images of the picture


def measure_switching(table: Path, ckpts: Sequence[Path]) -> dict:
    """What step-wise sampling cost, what the last model alone would have, and each model's part. table: switch_steps.csv.

    Both take as many network calls, guidance's included. A model's last step is the mean over the images that left it for the
    next; null where none did.
    """
    columns = np.genfromtxt(table, delimiter=",", names=True)
    evaluations = np.array([columns[f"evaluations_{i + 1}"].mean() for i in range(len(ckpts))])
    calls = float(evaluations.sum())
    models = []
    for i, path in enumerate(ckpts, start=1):
        config = read_checkpoint(path).config
        left = columns[f"switch_{i}_to_{i + 1}"] if i < len(ckpts) else np.array([-1])
        left = left[left >= 0]
        models.append({
            "mediators": config.mediator_num,
            "gmac_a_call": multiply_accumulates(config) / 1e9,
            "share_of_calls": float(evaluations[i - 1] / calls),
            "share_of_images_that_leave": len(left) / columns.size,
            "mean_last_step": float(left.mean()) if len(left) else None,
        })  # fmt: skip
    step_wise = sum(model["share_of_calls"] * model["gmac_a_call"] for model in models)
    return {
        "models": models,
        "step_wise": {"gmac_a_call": step_wise, "gmac_an_image": calls * step_wise},
        "last_alone": {"gmac_a_call": models[-1]["gmac_a_call"], "gmac_an_image": calls * models[-1]["gmac_a_call"]},
    }


def picture(samples: Path, path: Path) -> None:
    """The first samples of each class, one class a row."""
    with np.load(samples) as file:
        images, labels = file["arr_0"], file["arr_1"]
    classes = np.unique(labels)
    rows = [images[labels == label][:PER_CLASS] for label in classes]
    save_grid(np.concatenate(rows), path, PER_CLASS, [str(label) for label in classes])


def report(args: argparse.Namespace) -> None:
    figures = measure(args.data, {"step_wise": args.samples, "last_alone": args.samples_last})
    costs = measure_switching(args.switch_steps, args.ckpts)
    for name in ("step_wise", "last_alone"):
        figures[name] |= costs.pop(name)
    write_json(figures | costs, args.out / "metrics_mediators.json")
    picture(args.samples, args.out / "samples_switching.png")
    rows = quality_rows(figures, "step_wise", "last_alone", ">= 0.90", "")
    for key, title in (("gmac_a_call", "GMAC a network call"), ("gmac_an_image", "GMAC an image")):
        alone = figures["last_alone"][key]
        rows.append((title, figures["step_wise"][key], alone, f"< {alone:#.4g}"))
    print_table(figures, ("step-wise", f"M = {costs['models'][-1]['mediators']}"), rows)
    print(f"\n{'M':>3}{'GMAC a call':>14}{'share of calls':>17}{'images that leave it':>23}{'after step, mean':>19}")
    for model in costs["models"]:
        mediators, gmac, share, leave, step = model.values()
        step = "-" if step is None else f"{step:.1f}"
        print(f"{mediators:>3}{gmac:>14.5f}{share:>17.1%}{leave:>23.1%}{step:>19}")
    print(f"\n{args.out}: samples_switching.png, metrics_mediators.json")


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of examples/digits.py prepare")
    parser.add_argument("--samples", type=Path, required=True, help=".npz made step-wise")
    parser.add_argument("--samples-last", type=Path, required=True, help=".npz made with the last model alone")
    parser.add_argument("--switch-steps", type=Path, required=True, help="switch_steps.csv beside the step-wise samples")
    parser.add_argument("--ckpts", type=Path, nargs="+", required=True, help="the models' checkpoints, in the order of use")
    parser.add_argument("--out", type=Path, required=True, help="where the figures and the picture go")
    report(parser.parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
