"""Time every network against its plain formulation, beside what this machine's matrix products allow; write tables to
benchmarks/RESULTS.md, the rows to benchmarks/results-<device>.json and a picture of them beside it.

python -m benchmarks.run [--only forward training optimizer sampling memory] [--size S] [--budget-seconds 10]
"""

import sys
import textwrap
import time
from argparse import Namespace
from collections.abc import Callable, Sequence

import torch
from accelerate import PartialState

from benchmarks import compare, plot
from benchmarks.compare import System
from benchmarks.endtoend import sampling_rows
from benchmarks.hot_spots import own_times
from benchmarks.memory import memory_rows
from benchmarks.networks import add_limit_arguments
from benchmarks.report import device_name, environment, write_section
from benchmarks.rows import Part, Row, json_path, read_parts, table, write_parts
from benchmarks.speed import (
    AMM_ROUNDS,
    SHARE_ROUNDS,
    Measured,
    drawing_line,
    forward_rows,
    optimizer_rows,
    release,
    training_rows,
)
from benchmarks.targets import target_lines
from models.registry import model_config
from runtime import cli
from runtime.distributed import note, start

MEDIATORS = 16
LARGE = {"S": "EDT-B/2"}  # of the networks of a size the larger one, whose forward and optimizer are timed too
BATCHES = {  # unless the flags say otherwise, by device
    "cpu": {"batch_size": 8, "large_batch_size": 16, "train_batch_size": 8, "sample_batch_size": 64, "memory_batches": [2, 6]},
    "cuda": {
        "batch_size": 256, "large_batch_size": 128, "train_batch_size": 128, "sample_batch_size": 64, "memory_batches": [32, 96]
    },
}  # fmt: skip

CAPTION = """The ways to do one piece of work take turns in shuffled order, each model's for itself. Plain: written out from the
papers' formulas, in fp32, not compiled, position biases gathered at each call, softmax stored, modulation and gates as separate
operations; the masked pair as two passes. Times as fast as plain: the median of the rounds' ratios. Spread: interquartile range
/ median. GFLOP/s: the plain formulation's matrix products over the time. Products' GFLOP/s: the same products alone, at the
same shapes and in the path's precision, in the same run, medians of at least 15 (on a CPU, a forward's products by a weight:
torch.mm, or oneDNN's linear with the weight packed beforehand, whichever is faster at the shape). Share: the first over the
second, as the median of the rounds' own. Error: the norm of the difference from the plain result over that of the plain result.
Peak MB: what one call adds to the memory held before; on CUDA a replayed graph's own memory is held before."""
CAPTIONS = {
    "forward": """Forward, as in sampling. Where the last path had fewer than {share_rounds} rounds, it was measured once more
beside its products, for its share: "alone". AMM: attention modulation as published; the error is against the plain formulation
with it, times as fast as plain are against plain without. AMM's cost: the time it adds, with and without taking turns for
{amm_rounds} rounds.""",
    "training": """Training step with optimizer and average, each system's own (Adan: EDT, MDTv2; AdamW: DiT, SiT); drawing a
batch is left out on both sides. EDT and MDTv2 see each image in an unmasked and a masked pass, with one fixed mask of the mean
share: the number of tokens that MDTv2 keeps, which in training varies from step to step, is fixed here. MDTv2's step as
published sums both losses before one way back; in plain fp32 each pass goes back on its own, which halves what it holds. The
error is that of the loss. Saved: what is held for the way back, over the images of the batch, what does not grow with them
included.""",
    "optimizer": """Adan and the average of the weights, without network: ms/image is ms a step. The error is that of the
weights' way in two steps with different gradients.""",
    "sampling": """{sample_images} images of {sample_steps} DDIM steps without guidance in batches of {sample_batch_size} on
both sides, from noise to .npz, through a small VAE; each side did a job of 2 steps before, compilation included. Ours ran
before and after plain: the row has the median of its two runs and of their ratios. GFLOP/s are the network's. The error is that
of the uint8 images.""",
    "memory": """Gradient checkpointing ("recomputed") on the first system's training step, not compiled. Saved is here what the
peak grows by with an image, by the difference of two batches ("-": not seen to grow). Times as fast as plain: as
fp32 without it.""",
}
PARTS = tuple(CAPTIONS)


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts; the others' results stay")
    parser.add_argument("--size", choices=("Ti", "S"), default="S", help="of all networks; Ti: ours, for a quick look")
    parser.add_argument("--batch-size", type=cli.positive_int, help="images in a forward (default: 8, on a GPU 256)")
    parser.add_argument("--large-batch-size", type=cli.positive_int, help="the same for EDT-B/2 (default: 16, on a GPU 128)")
    parser.add_argument("--train-batch-size", type=cli.positive_int, help="in a training step (default: 8, on a GPU 128)")
    parser.add_argument("--sample-batch-size", type=cli.positive_int, help="sampled at once (default: 64)")
    parser.add_argument("--sample-images", type=cli.positive_int, default=64, help="images in all, on each side")
    parser.add_argument("--sample-steps", type=cli.number(int, 2, 1000), default=50, help="DDIM steps")
    parser.add_argument("--share-rounds", type=cli.positive_int, default=SHARE_ROUNDS, help="at least, for the share")
    parser.add_argument("--amm-rounds", type=cli.positive_int, default=AMM_ROUNDS, help="of AMM off and on, for its cost")
    parser.add_argument("--memory-batches", type=cli.positive_int, nargs=2, help="two batches (default: 2 6, on a GPU 32 96)")
    parser.add_argument(
        "--memory-gb", type=cli.positive_float, nargs="+", default=[24.0, 80.0], help="what batches shall fit in"
    )
    parser.add_argument("--compile", action=cli.BooleanFlag, default=True, help="also time what is compiled")
    add_limit_arguments(parser, repeats=15, budget_seconds=10.0, budget_is_for="for the rounds of a model in a part")
    args = parser.parse_args(argv)
    if args.memory_batches and len(set(args.memory_batches)) < 2:
        parser.error(f"--memory-batches {args.memory_batches[0]} {args.memory_batches[1]}: give two different ones")
    return args


def systems(size: str) -> list[System]:
    return compare.create_systems(Namespace(size=size, decode_layer=compare.DECODE_LAYER.get(size), mediators=[MEDIATORS]))


def large_config(args: Namespace) -> tuple[str, object]:
    label = LARGE.get(args.size, f"EDT-{args.size}/2")
    return label, model_config(label)


# Parts: (rows, lines) of each


def forward_part(args: Namespace, state: PartialState) -> tuple[list[Row], list[str]]:
    label, config = large_config(args)
    every = [(system, args.batch_size) for system in systems(args.size)]
    if args.size in LARGE:
        every.insert(1, (System(label, config, "adan"), args.large_batch_size))
    return _of_each(every, lambda system, batch: forward_rows(args, system, batch, state.device), state.device)


def training_part(args: Namespace, state: PartialState) -> tuple[list[Row], list[str]]:
    every = [(system, args.train_batch_size) for system in systems(args.size)]
    rows, lines = _of_each(every, lambda system, batch: training_rows(args, system, batch, state.device), state.device)
    return rows, [drawing_line(every[0][0], args.train_batch_size), "", *lines]


def _of_each(
    every: Sequence[tuple[System, int]], measure: Callable[[System, int], Measured], device: torch.device
) -> tuple[list[Row], list[str]]:
    """The rows of all systems, and where the time of the first one's last path goes."""
    rows, lines = [], []
    for system, batch in every:
        began = time.perf_counter()
        own, calls = measure(system, batch)
        rows += own
        if not lines:
            path = list(calls)[-1]
            lines = [
                f"Where the time goes, {system.label}, {path}, operators by their own time:",
                "",
                own_times(calls[path], device),
            ]
        del calls  # and with them the networks
        release()
        note(f"{own[0].work}, {system.label}: {time.perf_counter() - began:.0f} s, {own[0].rounds} rounds")
    return rows, lines


def optimizer_part(args: Namespace, state: PartialState) -> tuple[list[Row], list[str]]:
    label, config = large_config(args)
    return optimizer_rows(args, config, label, state.device)


def sampling_part(args: Namespace, state: PartialState) -> tuple[list[Row], list[str]]:
    edt = systems(args.size)[0]
    # A VAE's latents have 4 channels.
    return sampling_rows(args, model_config(edt.label, in_channels=4), edt.label, state)


def memory_part(args: Namespace, state: PartialState) -> tuple[list[Row], list[str]]:
    return memory_rows(args, systems(args.size)[0], args.memory_batches, state.device)


MEASURES = {
    "forward": forward_part,
    "training": training_part,
    "optimizer": optimizer_part,
    "sampling": sampling_part,
    "memory": memory_part,
}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    state = start()
    defaults = BATCHES.get(state.device.type, BATCHES["cpu"])
    for name, value in defaults.items():
        if not getattr(args, name):
            setattr(args, name, value)
    path = json_path(args.size, state.device)
    for name in args.only:
        began = time.perf_counter()
        rows, lines = MEASURES[name](args, state)
        release()
        seconds = time.perf_counter() - began
        note(f"{name}: {seconds:.0f} s")
        caption = CAPTIONS[name].format(**vars(args))
        write_parts(
            {name: Part(environment=environment(state.device), seconds=seconds, caption=caption, rows=rows, lines=lines)}, path
        )
    parts = read_parts(path)
    picture = plot.draw(path)
    text = report(parts, picture.name if picture else None, state.device)
    print(text)
    write_section(f"benchmarks.run: size {args.size} on {device_name(state.device)}", text)
    sys.stdout.flush()


def report(parts: dict[str, Part], picture: str | None, device: torch.device) -> str:
    """From the rows alone: a part may have been measured before the others. The targets are a CPU's."""
    rows = [row for name in PARTS if name in parts for row in parts[name].rows]
    minutes = sum(part.seconds for part in parts.values()) / 60
    blocks = [f"In all {minutes:.0f} minutes, compilation included.", _fill(CAPTION)]
    if device.type == "cpu" and (lines := list(target_lines(rows))):
        blocks += ["### Targets, for two cores of a CPU with AVX-512", "\n".join(lines)]
    for name in PARTS:
        if name in parts:
            part = parts[name]
            blocks += [f"### {name.capitalize()}", f"{part.environment}; {part.seconds:.0f} s.", _fill(part.caption)]
            blocks += [table(part.rows)] if part.rows else []
            blocks += ["\n".join(part.lines)] if part.lines else []
    if picture:
        blocks.append(f"![Achieved rate beside that of the matrix products alone]({picture})")
    return "\n\n".join(blocks)


def _fill(text: str) -> str:
    return textwrap.fill(text, 128, break_on_hyphens=False)


if __name__ == "__main__":
    cli.run(main)
