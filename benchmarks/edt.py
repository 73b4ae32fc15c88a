"""Time EDT's forward and its masked training step against plain formulations, and write the table to benchmarks/RESULTS.md.

python -m benchmarks.edt [--model EDT-S/2] [--batch-size 8] [--train-batch-size 4] [--threads 2] [--compile]
"""

import functools
import textwrap
from collections.abc import Sequence

import torch
from accelerate import Accelerator

from benchmarks.networks import (
    LEARNING_RATE,
    add_limit_arguments,
    compiled,
    forward_call,
    limits,
    random_inputs,
    randomized,
    training_batch,
    training_step,
)
from benchmarks.products import record_products
from benchmarks.reference import with_plain_attention
from benchmarks.report import device_name, environment, table, write_section
from benchmarks.timing import Case, Result, measure, time_ratio
from models import create_model, model_names
from models.registry import default_amm
from runtime import cli
from runtime.distributed import start, start_training
from training.data import Batch
from training.step import TrainingStep

CAPTION = """The cases take turns in shuffled order. Spread: interquartile range / median. Time / plain: the median of the
rounds' ratios to the plain formulation (attention written out, position bias gathered at each call; in training also one pass
after the other). GFLOP/s: the plain formulation's matrix products over the time. Products' GFLOP/s: the same products on their
own, same shapes and precision, in the same run (medians of at least 15). Share: the first over the second, as the median of
the rounds' own. Peak MB: the memory that one call adds to what is held before."""


def parse(argv: Sequence[str] | None):
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--model", choices=[name for name in model_names() if name.startswith("EDT")], default="EDT-S/2")
    parser.add_argument("--batch-size", type=cli.positive_int, default=8, help="images in a forward")
    parser.add_argument("--train-batch-size", type=cli.positive_int, default=4, help="images in a training step, each twice")
    parser.add_argument("--train-precision", choices=("fp32", "bf16"), default="fp32")
    add_limit_arguments(
        parser,
        repeats=15,
        budget_seconds=40.0,
        budget_is_for="for the rounds of the forwards, and again for those of the training steps",
    )
    parser.add_argument("--compile", action=cli.BooleanFlag, help="also time forwards with compiled blocks")
    return parser.parse_args(argv)


def forward_cases(args, device: torch.device) -> list[Case]:
    """fp32, fp32 with AMM and bf16, each beside its plain formulation."""
    model = randomized(create_model(args.model)).to(device).eval()
    modulated = create_model(args.model, amm=default_amm(args.model, input_size=model.config.input_size)).to(device).eval()
    modulated.load_state_dict(model.state_dict())
    inputs = random_inputs(model.config, args.batch_size, device)
    case = functools.partial(Case, items=args.batch_size)
    cases = []
    for name, network, dtype in (
        ("forward fp32", model, None),
        ("forward fp32, AMM", modulated, None),
        ("forward bf16", model, torch.bfloat16),
    ):
        plain = forward_call(with_plain_attention(network), inputs, dtype)
        products = record_products(plain)
        cases.append(case(f"{name}, plain", plain, products=products))
        variants = {name: network}
        if args.compile:
            variants[f"{name}, compiled"] = compiled(network)
        for variant, built in variants.items():
            cases.append(case(variant, forward_call(built, inputs, dtype), baseline=f"{name}, plain", products=products))
    return cases


def training_cases(args, accelerator: Accelerator) -> list[Case]:
    """One step on the masked pair of passes: as it is, with one pass after the other, and that with plain attention."""
    network = randomized(create_model(args.model))
    b = args.train_batch_size
    batch = training_batch(network.config, b, masked=True)
    plain = training_step(with_plain_attention(network), b, accelerator)
    together = training_step(network, b, accelerator)
    runs = {
        "training step, plain": lambda: one_pass_after_the_other(plain, batch),
        "training step, passes apart": lambda: one_pass_after_the_other(together, batch),
        "training step": lambda: together(0, batch, LEARNING_RATE),
    }
    baseline = next(iter(runs))
    return [
        Case(name, run, items=b, baseline=None if name == baseline else baseline, products=record_products(run))
        for name, run in runs.items()
    ]


def one_pass_after_the_other(step: TrainingStep, batch: Batch) -> None:
    """A plain form of :class:`TrainingStep`: each pass goes forward and back on its own, on half of the inputs."""
    batch = batch.to(step.accelerator.device)
    t = torch.linspace(0, step.diffusion.num_timesteps - 1, len(batch.x0), device=batch.x0.device).long()
    for y, noise, kept in zip(batch.y, batch.noise, (None, batch.kept), strict=True):
        losses = step.diffusion.training_losses(step.model, batch.x0, t, {"y": y, "kept": kept}, noise=noise)
        step.accelerator.backward(losses["loss"].mean())
    step.optimizer.step()
    step.optimizer.zero_grad(set_to_none=True)
    step.ema.update()


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = start().device
    forwards = measure(forward_cases(args, device), device=device, memory=True, **limits(args))
    accelerator = start_training(args.train_precision)
    steps = measure(training_cases(args, accelerator), device=device, memory=True, **limits(args))
    text = report(args, device, forwards, steps)
    print(text)
    write_section(f"benchmarks.edt: {args.model} on {device_name(device)}", text)


def report(args, device: torch.device, forwards: Sequence[Result], steps: Sequence[Result]) -> str:
    by_name = {result.name: result for result in steps}
    together = time_ratio(by_name["training step"], by_name["training step, passes apart"])
    what = f"""Medians of {len(forwards[0].seconds)} rounds of forwards with {args.batch_size} images and
{len(steps[0].seconds)} of {args.train_precision} training steps with {args.train_batch_size} images, each image in an unmasked
and a masked pass. {CAPTION}"""
    parts = (
        f"{environment(device)}.",
        textwrap.fill(what, 128),
        table([*forwards, *steps]),
        f"A training step with both passes together takes {together:.3f} of the time of one with the passes apart.",
    )
    return "\n\n".join(parts)


if __name__ == "__main__":
    cli.run(main)
