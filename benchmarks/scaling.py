"""How the cost grows with tokens, batch and processes, and what full runs would take on 1 to 64 GPUs; written to
benchmarks/RESULTS.md with a picture.

python -m benchmarks.scaling [--only tokens batch processes] [--image-sizes 256 512 1024] [--link-gbytes 25]
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.networks import (
    LEARNING_RATE,
    add_limit_arguments,
    forward_call,
    fresh_accelerator,
    limits,
    random_inputs,
    randomized,
    training_batch,
    training_step,
)
from benchmarks.projection import (
    BACKWARD_SHARE,
    GRADIENT_BYTES,
    GUIDED,
    SAMPLES,
    SAMPLING_STEPS,
    TRAINING_BATCH,
    TRAINING_STEPS,
    CallCost,
    TrainingProjection,
    fit_power,
    sampling_hours,
)
from benchmarks.report import device_name, environment, markdown, number, percent, write_section
from benchmarks.rows import json_path
from benchmarks.scaling_plot import draw
from benchmarks.timing import Case, measure
from models.macs import multiply_accumulates, trained_parameters
from models.registry import build_network, model_config
from runtime import cli
from runtime.distributed import check_precision, start, working_dtype
from training.step import TrainingStep

PARTS = ("tokens", "batch", "processes")
LATENT_FACTOR = 8  # image pixels to a latent pixel, along a side
MEDIATORS = 16
GPUS = (1, 2, 4, 8, 16, 32, 64)
PATIENCE_SECONDS = 600  # for a measurement with several processes
LAST_SECONDS = 30  # for those to end their own processes, once told to


@dataclass
class Measured:
    """Seconds. tokens: of a forward of one image, by model and number of tokens. forward, training: by batch. processes: of a
    training step with the same batch in each process, and exchange, of the gradient alone, by their number."""

    tokens: dict[str, dict[int, float]] = field(default_factory=dict)
    arithmetic: dict[str, dict[int, float]] = field(default_factory=dict)  # multiply-accumulates, alike
    forward: dict[int, float] = field(default_factory=dict)
    training: dict[int, float] = field(default_factory=dict)
    processes: dict[int, float] = field(default_factory=dict)
    exchange: dict[int, float] = field(default_factory=dict)


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--size", choices=("Ti", "S", "B"), default="S", help="of all networks; EDT's is the one projected")
    parser.add_argument("--image-sizes", type=cli.positive_int, nargs="+", default=[256, 384, 512, 768, 1024], help="in pixels")
    parser.add_argument("--batch-sizes", type=cli.positive_int, nargs="+", default=[1, 2, 4, 8], help="at 256 pixels")
    parser.add_argument("--processes", type=cli.positive_int, nargs="+", default=[1, 2], help="over gloo or NCCL")
    parser.add_argument("--process-batch-size", type=cli.positive_int, default=4, help="images of each process")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    parser.add_argument("--train-ms", type=cli.positive_float, help="a GPU's ms/image in training (default: as measured here)")
    parser.add_argument("--forward-ms", type=cli.positive_float, help="a GPU's ms/image of a forward (default: as measured)")
    parser.add_argument("--link-gbytes", type=cli.positive_float, default=25.0, help="GB/s that each GPU sends to the next")
    add_limit_arguments(parser, repeats=3, budget_seconds=40.0, budget_is_for="for the rounds of an image size")
    args = parser.parse_args(argv)
    if len(set(args.image_sizes)) < 2 or len(set(args.batch_sizes)) < 2:
        parser.error("--image-sizes and --batch-sizes: a fit needs two different ones or more")
    for size in args.image_sizes:
        for label in labels(args):
            try:
                config_of(label, size)
            except ValueError as error:
                parser.error(f"--image-sizes {size}: {error}")
    return args


def labels(args: Namespace) -> list[str]:
    return [f"{name}-{args.size}/2" for name in ("EDT", "DiT", "SiT")] + [f"SiT-{args.size}/2 M={MEDIATORS}"]


def config_of(label: str, image_size: int) -> object:
    if image_size % LATENT_FACTOR:
        raise ValueError(f"it must be divisible by {LATENT_FACTOR}, the side of a latent pixel")
    name, _, mediators = label.partition(" M=")
    settings = {"mediator_num": int(mediators)} if mediators else {}
    return model_config(name, input_size=image_size // LATENT_FACTOR, **settings)


# Measurements


def measure_tokens(args: Namespace, found: Measured, device: torch.device) -> None:
    """Forwards of one image; the networks of an image size take turns."""
    for size in args.image_sizes:
        cases, tokens = [], 0
        for label in labels(args):
            config = config_of(label, size)
            tokens = (config.input_size // config.patch_size) ** 2
            network = randomized(build_network(config)).to(device).eval()
            call = forward_call(network, random_inputs(config, 1, device), working_dtype(args.precision))
            cases.append(Case(label, call))
            found.arithmetic.setdefault(label, {})[tokens] = multiply_accumulates(config)
        for result in measure(cases, device=device, **limits(args)):
            found.tokens.setdefault(result.name, {})[tokens] = result.median


def measure_batch(args: Namespace, found: Measured, device: torch.device) -> None:
    """EDT's forward and training step at 256 pixels, all batches taking turns."""
    config = config_of(labels(args)[0], 256)
    network = randomized(build_network(config)).to(device).eval()
    calls = {
        batch: forward_call(network, random_inputs(config, batch, device), working_dtype(args.precision))
        for batch in args.batch_sizes
    }
    accelerator, trained = fresh_accelerator(args.precision), randomized(build_network(config))
    one = training_step(trained, 1, accelerator)
    cases = [Case(f"forward {batch}", call, batch) for batch, call in calls.items()]
    cases += [Case(f"training {batch}", _training_call(one, config, batch), batch) for batch in args.batch_sizes]
    for result in measure(cases, device=device, **limits(args)):
        getattr(found, result.name.split()[0])[result.items] = result.median


def _training_call(step: TrainingStep, config: object, batch_size: int) -> Callable[[], object]:
    batch = training_batch(config, batch_size, masked=hasattr(config, "mask_places"))
    sized = dataclasses.replace(step, global_batch_size=batch_size, share=range(batch_size), micro_batch_size=batch_size)
    return lambda: sized(0, batch, LEARNING_RATE)


def measure_processes(args: Namespace, found: Measured, device: torch.device) -> None:
    """Each process has the same batch and, on a CPU, the same number of threads, whatever their number."""
    threads = max(1, (args.threads or os.cpu_count()) // max(args.processes))
    for processes in sorted(set(args.processes)):
        if device.type == "cuda" and processes > torch.cuda.device_count():
            continue
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"),
            *("-m", "benchmarks.scaling_worker", "--model", labels(args)[0], "--batch-size", str(args.process_batch_size)),
            *("--precision", args.precision, "--repeats", str(args.repeats), "--threads", str(threads)),
        ]
        ran = _run(command)
        if ran is None:
            raise ValueError(
                f"the measurement with {processes} processes took over {PATIENCE_SECONDS} s: give a smaller "
                f"--process-batch-size than {args.process_batch_size}, or fewer --repeats than {args.repeats}"
            )
        if ran.returncode:
            said = [line for line in ran.stderr.splitlines() if "error: " in line.lower()]
            raise ValueError(f"the measurement with {processes} processes failed: {(said or ['it says nothing'])[0].strip()}")
        times = json.loads(ran.stdout.strip().splitlines()[-1])
        found.processes[processes] = times["step"]
        found.exchange[processes] = times["exchange"]


def _run(command: Sequence[str]) -> subprocess.CompletedProcess | None:
    """None where it took too long: then it is ended, with all it started."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent, start_new_session=True, **pipes) as process:
        try:
            out, said = process.communicate(timeout=PATIENCE_SECONDS)
            return subprocess.CompletedProcess(command, process.returncode, out, said)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """First by a signal that the launcher passes on: its workers are in groups of their own."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LAST_SECONDS)


MEASURES = {"tokens": measure_tokens, "batch": measure_batch, "processes": measure_processes}


# Projection


def project(args: Namespace, found: Measured) -> tuple[TrainingProjection | None, float | None]:
    """Of training, and the seconds of an image in a forward; None where neither a flag nor a measurement tells."""
    cost = CallCost(0.0, args.train_ms / 1e3) if args.train_ms else CallCost.fit(found.training) if found.training else None
    forward = args.forward_ms / 1e3 if args.forward_ms else None
    if forward is None and found.forward:
        largest = max(found.forward)
        forward = found.forward[largest] / largest
    if cost is None:
        return None, forward
    gradient = GRADIENT_BYTES * trained_parameters(config_of(labels(args)[0], 256))
    return TrainingProjection(cost, gradient, args.link_gbytes * 1e9), forward


# What is written


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = start().device
    check_precision(args.precision, device)
    found = Measured()
    for part in args.only:
        MEASURES[part](args, found, device)
    projection, forward = project(args, found)
    picture = plot_path(args.size, device)
    text = report(args, found, projection, forward, environment(device), picture.name)
    print(text)
    draw(picture, environment(device), found.tokens, found.processes, projection, GPUS, pace(args.train_ms))
    write_section(f"benchmarks.scaling: size {args.size} on {device_name(device)}", text)


def plot_path(size: str, device: torch.device) -> Path:
    return json_path(size, device, stem="scaling").with_suffix(".png")


def report(
    args: Namespace,
    found: Measured,
    projection: TrainingProjection | None,
    forward: float | None,
    measured_on: str,
    picture: str,
) -> str:
    blocks = [f"{measured_on}. Medians of up to {args.repeats} rounds in {args.precision}, not compiled."]
    if found.tokens:
        blocks += ["### Tokens", tokens_table(found), "\n".join(tokens_lines(found))]
    if found.forward:
        blocks += ["### Batch", batch_table(found), "\n".join(batch_lines(found))]
    if found.processes:
        blocks += ["### Processes", "\n".join(processes_lines(args, found))]
    if projection or forward:
        blocks += ["### Projected", _fill(assumptions(args, projection, forward)), projection_table(projection, forward)]
    return "\n\n".join([*blocks, f"![Cost against tokens, and the projected training run]({picture})"])


def tokens_table(found: Measured) -> str:
    sizes = list(next(iter(found.tokens.values())))
    rows = [["ms of a forward of one image", *(f"{size} tokens" for size in sizes)]]
    rows += [[label, *(number(1e3 * seconds[size]) for size in sizes)] for label, seconds in found.tokens.items()]
    return markdown(rows)


def tokens_lines(found: Measured) -> Iterator[str]:
    for label, seconds in found.tokens.items():
        law, work = fit_power(seconds), fit_power(found.arithmetic[label])
        last = fit_power(dict(list(seconds.items())[-2:]))
        yield (
            f"- {label}: time grows as tokens^{law.exponent:.2f} from {law.low:.0f} to {law.high:.0f} tokens (within "
            f"{percent(law.error)}), between the last two as tokens^{last.exponent:.2f}; its arithmetic as "
            f"tokens^{work.exponent:.2f}"
        )


def batch_table(found: Measured) -> str:
    rows = [["batch", "forward, ms/image", "training step, ms/image"]]
    for batch, seconds in found.forward.items():
        rows.append([str(batch), number(1e3 * seconds / batch), number(1e3 * found.training[batch] / batch)])
    return markdown(rows)


def batch_lines(found: Measured) -> Iterator[str]:
    for name, seconds in (("forward", found.forward), ("training step", found.training)):
        law, cost = fit_power(seconds), CallCost.fit(seconds)
        yield (
            f"- A {name} takes batch^{law.exponent:.2f} from {law.low:.0f} to {law.high:.0f} images (within "
            f"{percent(law.error)}), or {1e3 * cost.fixed:.1f} ms and {1e3 * cost.per_image:.1f} ms an image"
        )


def processes_lines(args: Namespace, found: Measured) -> Iterator[str]:
    one = found.processes.get(1)
    for processes, seconds in found.processes.items():
        images = processes * args.process_batch_size
        text = f"- {processes} process{'es' if processes > 1 else ''}, {images} images in all: {1e3 * seconds:.0f} ms a step"
        if processes > 1:
            text += f", of the gradient alone {1e3 * found.exchange[processes]:.0f} ms"
            text += f"; {percent(one / seconds)} of the speed of as many apart" if one else ""
        yield text


def pace(given: float | None) -> str:
    """What a projection takes a GPU for. given: by a flag."""
    return "at the GPU's speed that the flags give" if given else "if a GPU were this device"


def assumptions(args: Namespace, projection: TrainingProjection | None, forward: float | None) -> str:
    parts = ["Arithmetic, not measurements."]
    if projection:
        cost, megabytes = projection.cost, projection.gradient_bytes / 1e6
        parts.append(
            f"""Training, {pace(args.train_ms)}: {labels(args)[0]}, {TRAINING_STEPS:,} steps of {TRAINING_BATCH} images,
            masked pass included. A step
            of b images in a process takes {1e3 * cost.fixed:.2f} ms + b x {1e3 * cost.per_image:.3f} ms, as fitted above or as
            given; with P processes b = {TRAINING_BATCH}/P. The gradient, {megabytes:.0f} MB, goes round a ring: 2 (P-1)/P times
            its bytes at {args.link_gbytes:g} GB/s; the way back, {BACKWARD_SHARE:.2f} of the step, hides that much of it.
            Efficiency: the time of one process over P times that of P. Data are taken to be there in time."""
        )
    if forward:
        parts.append(
            f"""Sampling, {pace(args.forward_ms)}: {SAMPLES:,} images of {SAMPLING_STEPS} steps with guidance,
            {GUIDED} forwards each of {1e3 * forward:.3f} ms/image; decoding and writing are left out."""
        )
    return " ".join(" ".join(parts).split())


def projection_table(projection: TrainingProjection | None, forward: float | None) -> str:
    rows = [["GPUs", "ms/step", "exchange, ms", "efficiency", "training, hours", "sampling, hours"]]
    for gpus in GPUS:
        training = ["-"] * 4
        if projection:
            training = [
                number(1e3 * projection.step_seconds(gpus)),
                number(1e3 * projection.exchange_seconds(gpus)) if gpus > 1 else "0",
                percent(projection.efficiency(gpus)),
                number(projection.hours(gpus)),
            ]
        rows.append([str(gpus), *training, number(sampling_hours(forward, gpus)) if forward else "-"])
    return markdown(rows)


def _fill(text: str) -> str:
    return textwrap.fill(text, 128, break_on_hyphens=False)


if __name__ == "__main__":
    cli.run(main)
