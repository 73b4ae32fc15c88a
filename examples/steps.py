"""Quality against network calls on the demo's digits, for every solver and every guidance.

torchrun ... -m examples.steps measure ...     sample and measure each setting under three seeds; goes on where it stopped
python -m examples.steps report ...            tables, metrics_steps.json and steps.png from what was measured
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter
from scipy.stats import t as student
from torch import nn

from examples.digits import HELD_OUT, Judge, flatten
from models.checkpoints import Checkpoint, read_checkpoint
from models.macs import multiply_accumulates
from runtime import cli
from runtime.distributed import start, together
from runtime.fetch import digest
from runtime.figures import save_figure
from runtime.files import write_json
from sampling.generate import generate
from sampling.options import add_sampling_arguments, build_pipeline
from sampling.solver_options import add_transport_arguments, build_sampler

SEEDS = (0, 1, 2)
FACTS = "settings.json"  # what the figures in a folder are of
CALLS = (5, 8, 24)
# Each with the part of its axis that is drawn: few-step failures lie far outside.
FIGURES = (
    ("label_agreement", "samples the classifier reads as their label", (0.84, 1.01)),
    ("frechet_ratio", "Frechet distance / that of real images", (1.0, 3.0)),
)
GAUSSIAN, TRANSPORT, GUIDANCE = "Gaussian diffusion", "transport", "guidance, by dpm++2m"
SOLVERS = {
    GAUSSIAN: ("ancestral", "ddim", "dpm++2m", "dpm++sde2m", "unipc", "heun"),
    TRANSPORT: ("euler", "heun", "ab2", "ab3", "ab4"),
}
# The published protocol of Gaussian models, and the transports' with fewer than its 250 calls.
REFERENCES = {GAUSSIAN: ("ancestral", ("--solver", "ancestral"), 250), TRANSPORT: ("SDE", ("--mode", "SDE"), 100)}
GUIDED_SOLVER = "dpm++2m"
GUIDED_EVALUATIONS = (5, 12)


@dataclass(frozen=True)
class Setting:
    """flags: of inference.py, but for the number of steps, which is what ``evaluations`` unguided network calls allow."""

    panel: str
    name: str
    flags: tuple[str, ...]
    evaluations: int

    @property
    def cost(self) -> int:
        """Network calls, about."""
        return self.evaluations * (2 if self.panel == GUIDANCE else 1)

    @property
    def file(self) -> str:
        return f"{self.panel}-{self.name}-{self.evaluations}.json".replace(", ", "-").replace(" ", "_")


def all_settings(guide: Path) -> list[Setting]:
    """guide: the weaker checkpoint of autoguidance. The scales did best, by these figures, in a trial under another seed."""
    found = [Setting(panel, name, flags, calls) for panel, (name, flags, calls) in REFERENCES.items()]
    for panel, names in SOLVERS.items():
        found += [Setting(panel, name, ("--solver", name), calls) for name in names for calls in CALLS]
    guidances = {
        "constant": ("--cfg-scale", "1.25"),
        "power-cosine": ("--cfg-scale", "1.5", "--cfg-power", "1"),
        "interval": ("--cfg-scale", "1.5", "--guidance-interval", "0.2,0.8"),
        "autoguidance": ("--cfg-scale", "1.5", "--guide-ckpt", str(guide)),
    }
    for name, flags in guidances.items():
        flags = ("--solver", GUIDED_SOLVER, *flags)
        found += [Setting(GUIDANCE, name, flags, evaluations) for evaluations in GUIDED_EVALUATIONS]
    return found


def read_flags(flags: Sequence[str]) -> argparse.Namespace:
    parser = cli.ArgumentParser("")
    add_sampling_arguments(parser)
    add_transport_arguments(parser)
    return parser.parse_args([*flags])


def steps_within(flags: Sequence[str], checkpoint: Checkpoint, evaluations: int) -> int:
    """The largest --num-sampling-steps that makes at most so many network calls. Raises ValueError where there is none."""
    refused = None
    for steps in range(evaluations + 1, 0, -1):
        try:
            calls = build_sampler(read_flags([*flags, "--num-sampling-steps", str(steps)]), checkpoint).num_evaluations
        except ValueError as error:  # perhaps only of so few steps
            refused = refused or error
        else:
            if calls is not None and calls <= evaluations:
                return steps
    reason = f": {refused}" if refused else ""
    raise ValueError(f"{' '.join(flags)}: no number of steps makes at most {evaluations} network calls{reason}")


class Calls:
    """Counts the samples that a network is asked for, by wrapping its forward."""

    def __init__(self, network: nn.Module):
        self.count, self.gmac, forward = 0, multiply_accumulates(network.config) / 1e9, network.forward
        network.forward = self._counted(forward)

    def _counted(self, forward: Callable) -> Callable:
        def counted(x, t, y):
            self.count += len(x)
            return forward(x, t, y)

        return counted


def measure_setting(setting: Setting, checkpoint: Checkpoint, num_images: int, judge: Judge, device: torch.device) -> dict:
    """Its costs for an image, and the figures of each seed's images."""
    flags = ["--ckpt", str(checkpoint.path), *setting.flags]
    steps = steps_within(flags, checkpoint, setting.evaluations)
    args = read_flags([*flags, "--num-sampling-steps", str(steps)])
    pipeline = build_pipeline(args, device)
    networks = [network for network in (pipeline.model, pipeline.guidance.guide) if network is not None]
    counters, seeds = [Calls(network) for network in networks], []
    labels = np.arange(num_images) % pipeline.num_classes
    for seed in SEEDS:
        batches = generate(
            pipeline.model, pipeline.sampler, pipeline.codec, range(num_images), labels=labels.__getitem__, seed=seed,
            guidance=pipeline.guidance, batch_size=num_images,
        )  # fmt: skip
        images = np.concatenate([batch.images.numpy() for batch in batches])
        seeds.append(judge(flatten(images), labels))
    asked = num_images * len(SEEDS)
    return {
        **asdict(setting),
        "num_sampling_steps": steps,
        "calls": sum(counter.count for counter in counters) / asked,
        "gmac": sum(counter.count * counter.gmac for counter in counters) / asked,
        "seeds": seeds,
    }


def even_shares(settings: Sequence[Setting], number: int) -> list[list[Setting]]:
    """Of about the same number of network calls: the dearest setting first, each to who has the least to do."""
    shares, load = [[] for _ in range(number)], [0] * number
    for cost, _, setting in sorted(((s.cost, k, s) for k, s in enumerate(settings)), reverse=True):
        least = load.index(min(load))
        shares[least].append(setting)
        load[least] += cost
    return shares


def measure(args: argparse.Namespace) -> None:
    state, judge, settings = start(), Judge(args.data), all_settings(args.guide_ckpt)
    checkpoints = {TRANSPORT: read_checkpoint(args.transport_ckpt), GAUSSIAN: read_checkpoint(args.ckpt)}
    facts = {
        "settings": [json.loads(json.dumps(asdict(setting))) for setting in settings],
        "num_images": args.num_images,
        "sha256": [digest(path) for path in (args.ckpt, args.transport_ckpt, args.guide_ckpt)],
    }
    with together():
        if state.is_main_process:
            check_facts(facts, args.out)
    missing = [setting for setting in settings if not (args.out / setting.file).exists()]
    state.wait_for_everyone()  # nobody writes before all have seen what is missing
    for setting in even_shares(missing, state.num_processes)[state.process_index]:
        checkpoint = checkpoints[TRANSPORT if setting.panel == TRANSPORT else GAUSSIAN]
        found = measure_setting(setting, checkpoint, args.num_images, judge, state.device)
        write_json(found | {"of_real": judge.of_real}, args.out / setting.file)
        agreement, ratio = (f"{summarize(found, key)[0]:.3g}" for key, *_ in FIGURES)
        print(f"{setting.panel}, {setting.name}: {found['calls']:.3g} calls, agreement {agreement}, ratio {ratio}", flush=True)
    state.wait_for_everyone()


def check_facts(facts: dict, folder: Path) -> None:
    """Raises ValueError for a folder of figures of other networks or settings."""
    path = folder / FACTS
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(facts, path)
    elif json.loads(path.read_text()) != facts:
        raise ValueError(f"--out {folder} holds figures of other checkpoints or settings: give another folder, or remove it")


def summarize(found: dict, key: str) -> tuple[float, float]:
    """Mean of the seeds, and half the width of its 95 % confidence interval."""
    values = np.array([seed[key] for seed in found["seeds"]])
    within = student.ppf(0.975, len(values) - 1)
    return float(values.mean()), float(within * values.std(ddof=1) / np.sqrt(len(values)))


def draw(panels: dict[str, dict[str, list[dict]]], path: Path) -> None:
    """A column for each panel, a row for each figure, a line for each name."""
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    grid = figure.subplots(len(FIGURES), len(panels), sharex=True, sharey="row")
    for column, (panel, lines) in zip(grid.T, panels.items(), strict=True):
        for axes, (key, title, shown) in zip(column, FIGURES, strict=True):
            for name, points in lines.items():
                mean, half = zip(*(summarize(point, key) for point in points), strict=True)
                axes.errorbar([point["calls"] for point in points], mean, half, marker="o", markersize=4, capsize=2, label=name)
            axes.set(xscale="log", ylim=shown, ylabel=title if axes in grid[:, 0] else "")
            axes.set_xticks([5, 8, 12, 24, 50, 100, 250])
            axes.xaxis.set(major_formatter=ScalarFormatter(), minor_formatter=NullFormatter())
            axes.grid(alpha=0.3)
        column[0].set_title(panel)
        column[-1].set_xlabel("network calls an image")
        column[-1].legend(fontsize="small")
    save_figure(figure, path, dpi=90)


def print_tables(panels: dict[str, dict[str, list[dict]]]) -> None:
    for panel, lines in panels.items():
        print(f"\n{panel}\n{'':14}{'calls':>7}{'GMAC':>8}{'label agreement %':>20}{'Frechet ratio':>18}{'nearest':>9}")
        for name, points in lines.items():
            for point in points:
                (agreement, a), (ratio, r) = (summarize(point, key) for key, *_ in FIGURES)
                nearest, _ = summarize(point, "median_distance_to_training")
                print(
                    f"{name:14}{point['calls']:7.3g}{point['gmac']:8.3f}{f'{100 * agreement:.1f} +- {100 * a:.1f}':>20}"
                    f"{f'{ratio:.2f} +- {r:.2f}':>18}{nearest:9.2f}"
                )


def report(args: argparse.Namespace) -> None:
    """Raises ValueError where something was not measured."""
    panels: dict[str, dict[str, list[dict]]] = {}
    for setting in all_settings(Path()):
        path = args.measured / setting.file
        if not path.is_file():
            raise ValueError(f"{path} is missing: run examples.steps measure to its end first")
        found = json.loads(path.read_text())
        panels.setdefault(setting.panel, {}).setdefault(setting.name, []).append(found)
        if setting.panel == GAUSSIAN and setting.name == GUIDED_SOLVER:  # beside what guidance makes of it
            panels.setdefault(GUIDANCE, {}).setdefault("none", []).append(found)
    for lines in panels.values():
        for points in lines.values():
            points.sort(key=lambda point: point["calls"])
    write_json(panels, args.out / "metrics_steps.json")
    draw(panels, args.out / "steps.png")
    print_tables(panels)
    print(f"\n{args.out}: steps.png, metrics_steps.json")


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, dest="command")
    sample = commands.add_parser("measure", description="sample and measure every setting")
    sample.add_argument("--data", type=Path, required=True, help="the folder of examples/digits.py prepare")
    sample.add_argument("--ckpt", type=Path, required=True, help="trained for Gaussian diffusion")
    sample.add_argument("--transport-ckpt", type=Path, required=True, help="trained as a transport")
    sample.add_argument("--guide-ckpt", type=Path, required=True, help="the weaker checkpoint of autoguidance")
    sample.add_argument("--num-images", type=cli.positive_int, default=HELD_OUT + 1, help="of each setting and seed")
    sample.add_argument("--out", type=Path, required=True, help="folder of the figures, a file a setting")
    judge = commands.add_parser("report", description="tables and a picture of what was measured")
    judge.add_argument("--measured", type=Path, required=True, help="the folder that measure filled")
    judge.add_argument("--out", type=Path, required=True, help="where metrics_steps.json and steps.png go")
    args = parser.parse_args(argv)
    {"measure": measure, "report": report}[args.command](args)


if __name__ == "__main__":
    cli.run(main)
