"""Compare EDT, DiT, MDTv2, SiT and SiT with mediators, forward and training step, and write table and plot to benchmarks/.

python -m benchmarks.compare [--size S] [--mediators 16] [--batch-size 8] [--train-batch-size 4] [--precision bf16] [--compile]
"""

import copy
import dataclasses
import functools
import re
import statistics
import textwrap
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from benchmarks.networks import (
    LEARNING_RATE,
    add_limit_arguments,
    compiled,
    forward_call,
    limits,
    modes,
    random_inputs,
    randomized,
    training_batch,
    training_step,
)
from benchmarks.report import RESULTS, device_name, environment, markdown, number, percent, write_section
from benchmarks.timing import Case, Result, measure, round_ratios
from models.macs import multiply_accumulates, trained_parameters, training_multiply_accumulates
from models.registry import PUBLISHED, build_network, model_config
from runtime import cli
from runtime.distributed import start_training, working_dtype
from runtime.figures import save_figure
from training.step import TrainingStep

FOLDER = RESULTS.parent
fill = functools.partial(textwrap.fill, width=128, break_on_hyphens=False)
DECODE_LAYER = {"S": 6}  # of the published run, where it is not the config's default
WORK = {"forward": "inference", "training": "training"}  # what is timed -> the EDT paper's word for it
PAPER_SPEEDUPS = {  # of EDT over MDTv2 of the same size: the EDT paper's abstract
    "S": {"training": 3.93, "inference": 2.29},
    "B": {"training": 2.84, "inference": 2.29},
    "XL": {"training": 1.92, "inference": 2.22},
}

CAPTION = """All cases take turns in shuffled order. Parameters: the trained ones. GMAC: multiply-accumulates of one image's
products and convolutions; training: forward and back to the weights, in all passes. Published: the papers' "GFLOPs". Spread:
interquartile range / median. MB: the memory that one call adds to what is held before, at its peak. A training step is that of
the training scripts, EMA included, with each system's published optimizer and, for DiT, uniform timesteps and no min-SNR
weight; drawing the batch is left out: on a GPU, training does it in a thread, one step ahead. EDT and MDTv2 see each image in
an unmasked and a masked pass, with one mask for all rounds, of the mean share: MDTv2 encodes the kept tokens only, EDT drops
tokens without saving arithmetic. Speed-ups: medians of the rounds' ratios and, in brackets, their middle half. GMAC alone: what
they would be if all arithmetic were equally fast."""
PAPER_CAPTION = """The paper compares the code of EDT with that of MDTv2, each as published, on its GPUs. Here both have the
same attention module and the same training loop, on the device above: what is left is the difference of the networks, of their
masked passes and of the kernels that take them (on CUDA, heads of 52 channels, as EDT's, are padded to 56)."""


@dataclass(frozen=True)
class System:
    """A network as it was published: its label, in :data:`models.registry.PUBLISHED` where that has figures, its config, its
    optimizer and what its objective has in place of this code's defaults."""

    label: str
    config: object
    optimizer: str
    recipe: dict = field(default_factory=dict)

    @property
    def masked(self) -> bool:
        """Whether a training step has a masked pass as well."""
        return hasattr(self.config, "mask_places")

    @property
    def published_gmac(self) -> float | None:
        return PUBLISHED[self.label].gmac if self.label in PUBLISHED else None

    def macs(self, work: str) -> int:
        """Of one image. work: forward or training."""
        if work == "forward":
            return multiply_accumulates(self.config)
        return training_multiply_accumulates(self.config, self.masked)


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument(
        "--size",
        choices=("Ti", "S", "B", "XL"),
        default="S",
        help="of all networks, which are held together; Ti: ours, 16x16 pixels; XL: takes some 120 GB in training",
    )
    parser.add_argument(
        "--mediators", type=cli.positive_int, nargs="+", default=[16], help="square numbers: SiT with so many in every block"
    )
    parser.add_argument(
        "--decode-layer", type=cli.positive_int, help="MDTv2's decoder blocks (default: 6 for S as published, else the model's)"
    )
    parser.add_argument("--batch-size", type=cli.positive_int, default=8, help="images in a forward")
    parser.add_argument("--train-batch-size", type=cli.positive_int, default=4, help="images in a training step")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of forwards and training steps")
    add_limit_arguments(parser, repeats=15, budget_seconds=180.0, budget_is_for="for all rounds")
    parser.add_argument("--compile", action=cli.BooleanFlag, help="also time forwards and training with compiled blocks")
    args = parser.parse_args(argv)
    if len(set(args.mediators)) < len(args.mediators):
        parser.error(f"--mediators {' '.join(map(str, args.mediators))}: give each number once")
    args.decode_layer = args.decode_layer or DECODE_LAYER.get(args.size)
    for flag, name, settings in (
        (f"--decode-layer {args.decode_layer}", "MDTv2", _mdt_settings(args)),
        *((f"--mediators {count}", "SiT", {"mediator_num": count}) for count in args.mediators),
    ):
        try:
            model_config(f"{name}-{args.size}/2", **settings)
        except ValueError as error:
            parser.error(f"{flag}: {error}")
    return args


def _mdt_settings(args: Namespace) -> dict:
    return {"decode_layer": args.decode_layer} if args.decode_layer else {}


def create_systems(args: Namespace) -> list[System]:
    edt, dit, mdt, sit = (f"{name}-{args.size}/2" for name in ("EDT", "DiT", "MDTv2", "SiT"))
    return [
        System(edt, model_config(edt), "adan"),
        System(mdt, model_config(mdt, **_mdt_settings(args)), "adan"),
        System(dit, model_config(dit), "adamw", {"timestep_sampler": "uniform", "min_snr_gamma": 0.0}),
        System(sit, model_config(sit), "adamw"),
        *(System(f"{sit} M={count}", model_config(sit, mediator_num=count), "adamw") for count in args.mediators),
    ]


def pairs(systems: Sequence[System]) -> Iterator[tuple[System, System]]:
    """Which are compared: EDT with MDTv2 and with DiT, SiT's mediators with plain attention."""
    edt, mdt, dit, sit, *mediators = systems
    yield edt, mdt
    yield edt, dit
    for system in mediators:
        yield system, sit


def cases_of(system: System, args: Namespace, accelerator: Accelerator) -> Iterator[Case]:
    """A forward and a training step, each also compiled where asked for: blocks, and on a CPU Adan."""
    network = randomized(build_network(system.config)).to(accelerator.device)
    # With weights of its own: sampling expands its position biases once, and again whenever a step has written to them.
    sampler = copy.deepcopy(network).eval()
    sampler.tokens_vary = False  # nothing is masked in sampling: compiled for one shape
    inputs = random_inputs(system.config, args.batch_size, accelerator.device)
    batch = training_batch(system.config, args.train_batch_size, masked=system.masked)
    steps = _training_steps(network, system, args, accelerator)
    for mode, step in zip(modes(args), steps, strict=True):
        if mode:
            sampler = compiled(sampler)
        forward = forward_call(sampler, inputs, working_dtype(args.precision))
        yield Case(f"{system.label}, forward{mode}", forward, args.batch_size)
        train = functools.partial(step, 0, batch, LEARNING_RATE)
        yield Case(f"{system.label}, training{mode}", train, args.train_batch_size)


def _training_steps(network: nn.Module, system: System, args: Namespace, accelerator: Accelerator) -> Iterator[TrainingStep]:
    """For each mode. On a GPU, whose memory is scarce and where Adan is not compiled, both move the same weights."""
    settings = (args.train_batch_size, accelerator, system.optimizer)
    # Copied before accelerate wraps the network's forward.
    shares = accelerator.device.type != "cpu"
    twin = (compiled if shares else copy.deepcopy)(network.train()) if args.compile else None
    step = training_step(network, *settings, **system.recipe)
    yield step
    if shares and twin is not None:
        yield dataclasses.replace(step, model=accelerator.prepare(twin))
    elif twin is not None:
        yield training_step(twin, *settings, compile=True, **system.recipe)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    accelerator = start_training(args.precision)
    device, systems = accelerator.device, create_systems(args)
    cases = [case for system in systems for case in cases_of(system, args, accelerator)]
    results = {result.name: result for result in measure(cases, device=device, memory=True, **limits(args))}
    path = plot_path(args.size, device)
    text = report(args, device, systems, results, path.name)
    print(text)
    draw(path, f"size {args.size}, {args.precision}, {device_name(device)}", systems, modes(args), results)
    write_section(f"benchmarks.compare: size {args.size} on {device_name(device)}", text)


# What is written


def report(args: Namespace, device: torch.device, systems: Sequence[System], results: dict[str, Result], plot_name: str) -> str:
    rounds = len(next(iter(results.values())).seconds)
    batches = f"forwards of {args.batch_size} and training steps of {args.train_batch_size} images"
    optimizers = {name: [system.label for system in systems if system.optimizer == name] for name in ("adan", "adamw")}
    trained_by = f"Adan: {', '.join(optimizers['adan'])}. AdamW: {', '.join(optimizers['adamw'])}."
    [decode_layer] = {system.config.decode_layer for system in systems if hasattr(system.config, "decode_layer")}
    decoder = f"MDTv2 has {decode_layer} decoder blocks."
    what_is = " Compiled: each block, and on a CPU Adan; MDTv2's in training for any number of tokens."
    by_compiler = what_is if args.compile else ""
    sources = "; ".join(f"{s.label}: {PUBLISHED[s.label].source}" for s in systems if s.published_gmac is not None)
    what = f"Medians of {rounds} rounds of {args.precision} {batches}. {CAPTION} {trained_by} {decoder}{by_compiler} {sources}."
    paper = (fill(PAPER_CAPTION),) if args.size in PAPER_SPEEDUPS else ()
    parts = (
        f"{environment(device)}.",
        fill(what),
        systems_table(systems),
        times_table(systems, modes(args), results),
        "\n".join(speedup_lines(args, systems, results)),
        *paper,
        f"![Milliseconds an image beside what multiply-accumulates alone would take]({plot_name})",
    )
    return "\n\n".join(parts)


def systems_table(systems: Sequence[System]) -> str:
    rows = [["system", "parameters, M", "forward GMAC", "published", "training GMAC"]]
    for system in systems:
        published = "-" if system.published_gmac is None else f"{system.published_gmac:.2f}"
        gmacs = [f"{system.macs(work) / 1e9:.3f}" for work in WORK]
        rows.append([system.label, f"{trained_parameters(system.config) / 1e6:.2f}", gmacs[0], published, gmacs[1]])
    return markdown(rows)


def times_table(systems: Sequence[System], modes: Sequence[str], results: dict[str, Result]) -> str:
    """Forward and training of a system side by side."""
    measured = ("ms/image", "spread", "images/s", "MB")
    rows = [["system", *(f"{work} {name}" if name == measured[0] else name for work in WORK for name in measured)]]
    for mode in modes:
        for system in systems:
            cells = []
            for work in WORK:
                result = results[f"{system.label}, {work}{mode}"]
                peak = None if result.peak_bytes is None else result.peak_bytes / 1e6
                cells += [
                    number(result.ms_per_item), percent(result.spread), number(1e3 / result.ms_per_item), number(peak)
                ]  # fmt: skip
            rows.append([system.label + mode, *cells])
    return markdown(rows)


def speedup_lines(args: Namespace, systems: Sequence[System], results: dict[str, Result]) -> Iterator[str]:
    """How many times as fast one system is as another, beside the paper's figure and the ratio of their work."""
    for work, word in WORK.items():
        for mode in modes(args):
            for fast, slow in pairs(systems):
                ratios = round_ratios(*(results[f"{system.label}, {work}{mode}"] for system in (slow, fast)))
                paper = paper_speedup(args, word) if (fast, slow) == next(pairs(systems)) else None
                yield (
                    f"- {word.capitalize()}{mode}: {fast.label} is {_median_and_middle(ratios)} times as fast as {slow.label}"
                    f"{'' if paper is None else f' (paper: {paper:.2f})'}; GMAC alone: {slow.macs(work) / fast.macs(work):.2f}"
                )


def paper_speedup(args: Namespace, word: str) -> float | None:
    """Of EDT over MDTv2; None where the paper has no such MDTv2."""
    as_published = args.decode_layer == DECODE_LAYER.get(args.size)
    return PAPER_SPEEDUPS.get(args.size, {}).get(word) if as_published else None


def _median_and_middle(ratios: Sequence[float]) -> str:
    median = f"{statistics.median(ratios):.2f}"
    if len(ratios) < 2:
        return median
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{median} [{low:.2f}-{high:.2f}]"


def plot_path(size: str, device: torch.device) -> Path:
    """compare.png is size S on a CPU; other sizes and devices have files of their own."""
    parts = ["compare", *([] if size == "S" else [size])]
    if device.type != "cpu":
        parts.append(re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-"))
    return FOLDER / f"{'-'.join(parts)}.png"


def draw(path: Path, title: str, systems: Sequence[System], modes: Sequence[str], results: dict[str, Result]) -> None:
    """Bars of ms/image for forward and training; a mark where DiT's time for a multiply-accumulate puts the system's work."""
    from matplotlib.figure import Figure  # imported here: it costs half a second

    figure = Figure(figsize=(11, 0.9 + 0.45 * len(systems) * len(modes) + 0.8), layout="constrained")
    figure.suptitle(title)
    reference = next(system for system in systems if system.label.startswith("DiT"))
    height = 0.8 / len(modes)
    for axes, work in zip(figure.subplots(1, len(WORK), sharey=True), WORK, strict=True):
        for k, mode in enumerate(modes):
            places = [i + (k - (len(modes) - 1) / 2) * height for i in range(len(systems))]
            times = [results[f"{system.label}, {work}{mode}"].ms_per_item for system in systems]
            per_mac = results[f"{reference.label}, {work}{mode}"].ms_per_item / reference.macs(work)
            axes.barh(places, times, 0.9 * height, color=f"C{k}", alpha=0.7, label="measured" + mode)
            expected = [per_mac * system.macs(work) for system in systems]
            label = None if k else f"GMAC alone, at {reference.label}'s rate"
            axes.plot(expected, places, "|", color="black", markersize=30 * height, markeredgewidth=2, label=label)
            for place, own, other, system in zip(places, times, expected, systems, strict=True):
                text = f"{number(own)} ms, {system.macs(work) / 1e9:.3g} GMAC"
                axes.text(max(own, other), place, f"  {text}", va="center", fontsize=8)
        axes.set(title=work, xlabel="ms/image", yticks=range(len(systems)), yticklabels=[s.label for s in systems])
        axes.set_xlim(right=1.45 * axes.dataLim.x1)
        axes.grid(axis="x", alpha=0.3)
    axes.invert_yaxis()  # shared
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, markerscale=0.4)
    save_figure(figure, path, dpi=120)


if __name__ == "__main__":
    cli.run(main)
