"""Networks compared on the demo's digits at equal training compute.

python -m examples.compare steps ...     the number of training steps that a budget of multiply-accumulates allows
python -m examples.compare report ...    measure samples of each network's checkpoints against what its training took; prints
                                         tables, writes metrics_compare.json and compare.png
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from examples.digits import measure
from models.checkpoints import read_checkpoint, read_file
from models.macs import multiply_accumulates, trained_parameters, training_multiply_accumulates
from models.registry import model_config, model_names
from runtime import cli
from runtime.figures import save_figure
from runtime.files import write_json
from sampling.writers import SETTINGS
from training.checkpoint import checkpoint_files

PANELS = (
    ("label_agreement", "samples the classifier reads as their label", "linear"),
    ("frechet_ratio", "Frechet distance / that of real images", "log"),
)
NEAREST = ("median_distance_to_training", "median distance to the nearest training image")


def steps_within(gmac: float, config: object, masked: bool, batch_size: int) -> int:
    """How many training steps of a batch ``gmac`` 10^9 multiply-accumulates allow. Raises ValueError for less than one."""
    a_step = batch_size * training_multiply_accumulates(config, masked)
    steps = int(gmac * 1e9 // a_step)
    if not steps:
        raise ValueError(f"--budget-gmac {gmac} does not allow one step of {batch_size} images: it takes {a_step / 1e9:.3g}")
    return steps


def read_run(folder: Path) -> tuple[dict, dict[int, Path]]:
    """A network's costs and, for every checkpoint of its run, the file of samples, by the step.

    folder: ``<run>/checkpoints/<step>.pt`` of one run, and ``samples/<step>`` of sample_ddp.py. Raises ValueError where
    something is missing.
    """
    runs = [found for run in sorted(folder.iterdir()) if (found := checkpoint_files(run))] if folder.is_dir() else []
    if len(runs) != 1:
        raise ValueError(
            f"{folder} must hold the checkpoints of one run, made with --results-dir {folder}; it holds {len(runs)}"
        )
    ckpts, samples = runs[0][::-1], {}
    for path in ckpts:
        found = sorted((folder / "samples" / path.stem).glob("samples_*.npz"))
        if len(found) != 1:
            raise ValueError(f"{folder}/samples/{path.stem} must hold one samples_*.npz, of {path}; it holds {len(found)}")
        samples[int(path.stem)] = found[0]
    checkpoint, args = read_checkpoint(ckpts[-1]), read_file(ckpts[-1])["args"]
    config, masked, batch_size = checkpoint.config, args["masked"], args["global_batch_size"]
    mediators = getattr(config, "mediator_num", None)
    forward, training = multiply_accumulates(config) / 1e9, training_multiply_accumulates(config, masked) / 1e9
    costs = {
        "model": checkpoint.model + (f" M={mediators}" if mediators else ""),
        "masked_training": masked,
        "parameters": trained_parameters(config),
        "gmac_a_call": forward,
        "gmac_an_image_in_training": training,
        "gmac_a_step": batch_size * training,
        "gmac_a_sample": network_calls(found[0].parent) * forward,
    }
    return costs, samples


def network_calls(samples: Path) -> int:
    """For one unguided image, as the folder's settings say: an ancestral sampler's steps, or an SDE's points in time, whose
    last step takes a call as well."""
    settings = json.loads((samples / SETTINGS).read_text())
    return settings["num_steps"] if settings["sampler"] == "SDE" else settings["num_sampling_steps"]


def measure_runs(data: Path, folders: Sequence[Path]) -> dict:
    """Figures of the real images and, under "networks", each one's costs and the figures at its checkpoints. Raises ValueError
    where one network has another number of checkpoints or another training compute than the rest."""
    runs = [read_run(folder) for folder in folders]
    numbers = {str(folder): len(samples) for folder, (_, samples) in zip(folders, runs, strict=True)}
    if len(set(numbers.values())) > 1:
        counts = ", ".join(f"{folder} {number}" for folder, number in numbers.items())
        raise ValueError(f"the networks have different numbers of checkpoints ({counts}): train all to the end of the budget")
    totals = [max(samples) * costs["gmac_a_step"] for costs, samples in runs]
    if max(totals) - min(totals) > max(costs["gmac_a_step"] for costs, _ in runs):
        each = ", ".join(f"{folder} {total:.0f}" for folder, total in zip(folders, totals, strict=True))
        raise ValueError(f"the networks were trained with different compute (GMAC: {each}): train all for one budget")
    figures = measure(data, {str(path): path for _, samples in runs for path in samples.values()})
    networks = []
    for costs, samples in runs:
        points = [
            {"step": step, "training_gmac": step * costs["gmac_a_step"], **figures.pop(str(samples[step]))} for step in samples
        ]
        networks.append(costs | {"checkpoints": points})
    return figures | {"networks": networks}


def draw(networks: Sequence[dict], path: Path) -> None:
    """A panel for each figure, against the multiply-accumulates of training; a line for each network."""
    from matplotlib.figure import Figure  # imported here: steps has no use for it
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (key, title, scale) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for network in networks:
            points = network["checkpoints"]
            x, y = ([point[name] for point in points] for name in ("training_gmac", key))
            axes.plot(x, y, marker="o", label=network["model"])
        axes.set(xlabel="GMAC of training", title=title, yscale=scale, xlim=(0, None))
        if scale == "log":
            axes.yaxis.set(major_formatter=ScalarFormatter(), minor_formatter=ScalarFormatter())  # 3, not 3 x 10^0
        axes.grid(alpha=0.3, which="both")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(networks))
    save_figure(figure, path, dpi=120)


def print_tables(figures: dict) -> None:
    networks = figures["networks"]
    print(f"\nclassifier on held-out real digits: {figures['classifier_accuracy_on_held_out']:.3f}\n")
    print(f"{'':16}{'parameters M':>13}{'steps':>7}{'GMAC: a call':>14}{'a sample':>10}{'a training image':>18}{'in all':>8}")
    for network in networks:
        last = network["checkpoints"][-1]
        print(
            f"{network['model']:16}{network['parameters'] / 1e6:13.2f}{last['step']:7}{network['gmac_a_call']:14.4f}"
            f"{network['gmac_a_sample']:10.3f}{network['gmac_an_image_in_training']:18.4f}{last['training_gmac']:8.0f}"
        )
    number = len(networks[0]["checkpoints"])
    shares = "".join(f"{f'{i + 1}/{number}':>8}" for i in range(number))
    for key, title in (*(panel[:2] for panel in PANELS), NEAREST):
        print(f"\n{title}, after these parts of the training\n{'':16}{shares}")
        for network in networks:
            print(f"{network['model']:16}" + "".join(f"{point[key]:#8.3g}" for point in network["checkpoints"]))


def report(args: argparse.Namespace) -> None:
    figures = measure_runs(args.data, args.runs)
    write_json(figures, args.out / "metrics_compare.json")
    draw(figures["networks"], args.out / "compare.png")
    print_tables(figures)
    print(f"\nmedian distance of held-out images to training images: {figures['median_distance_of_held_out_to_training']:.3g}")
    print(f"\n{args.out}: compare.png, metrics_compare.json")


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, dest="command")
    count = commands.add_parser("steps", description="print how many training steps a budget allows")
    count.add_argument("--model", choices=model_names(), required=True, help="trained masked where it has a masked pass")
    count.add_argument("--mediator-num", type=cli.positive_int, help="SiT only: attention through so many mediator tokens")
    count.add_argument("--batch-size", type=cli.positive_int, required=True, help="images a step")
    count.add_argument(
        "--budget-gmac", type=cli.positive_float, required=True, help="10^9 multiply-accumulates of all training"
    )
    judge = commands.add_parser("report", description="measure the samples of all checkpoints")
    judge.add_argument("--data", type=Path, required=True, help="the folder of examples/digits.py prepare")
    judge.add_argument(
        "--runs", type=Path, nargs="+", required=True, help="of each network the --results-dir, with samples/<step> in it"
    )
    judge.add_argument("--out", type=Path, required=True, help="where the figures and the picture go")
    args = parser.parse_args(argv)
    if args.command == "report":
        return report(args)
    config = model_config(args.model, **({"mediator_num": args.mediator_num} if args.mediator_num else {}))
    print(steps_within(args.budget_gmac, config, hasattr(config, "mask_places"), args.batch_size))


if __name__ == "__main__":
    cli.run(main)
