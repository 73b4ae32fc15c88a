"""Time SiT-S/2 with attention mediators against plain attention, and write the table to benchmarks/RESULTS.md.

python -m benchmarks.mediators [--image-sizes 256 512 1024] [--mediators 4 64] [--batch-size 2] [--threads 2] [--compile]
"""

import copy
import dataclasses
import textwrap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.networks import add_limit_arguments, compiled, forward_call, limits, modes, random_inputs, randomized
from benchmarks.plain_loops import sample_with_two_calls
from benchmarks.reference import with_plain_attention
from benchmarks.report import device_name, environment, table, write_section
from benchmarks.timing import Case, Result, measure, time_ratio
from diffusion.transport import Sampler, create_transport
from models import create_model
from models.attention import Attention
from models.macs import multiply_accumulates as macs
from models.registry import model_config
from models.sit import SiTConfig
from runtime import cli
from runtime.distributed import start

MODEL, TINY_MODEL = "SiT-S/2", "SiT-Ti/2"
LATENT_FACTOR = 8  # image pixels to a latent pixel, along a side
SDE_POINTS, TIMED_SDE_POINTS = 250, 25
SDE_OPTIONS = {"sampling_method": "Euler", "diffusion_form": "sigma", "last_step": "Mean"}
TARGETS = {  # times as fast as plain attention: by image size, then by mediators
    256: {4: 1.05, 64: 0.97},
    512: {4: 1.38, 64: 1.28},
    1024: {4: 2.75, 64: 2.4},
}

CAPTION = """The cases of one image size take turns in shuffled order. Spread: interquartile range / median. Plain: fused
attention, every token to every token. M: mediators in every block. Published: the same weights and products, but position
biases are resized, added and repeated over the batch at each call, scores and probabilities stored, q, k and v copied apart,
and the convolution gets a copy in (B, D, n, n). Floor: of the attention only its linears, out = proj(v). Ratios: medians of the
rounds' own; compiled cases are compared with compiled ones. GMAC: multiply-accumulates of one image. Peak MB: the memory that
one call adds to what is held before. The targets are for fp32, eager, 2 images, on a CPU."""


def parse(argv: Sequence[str] | None):
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--image-sizes", type=cli.positive_int, nargs="+", default=[256, 512, 1024], help="sides in pixels")
    parser.add_argument("--mediators", type=cli.positive_int, nargs="+", default=[4, 64], help="square numbers")
    parser.add_argument("--batch-size", type=cli.positive_int, default=2, help="images in a forward")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    add_limit_arguments(parser, repeats=31, budget_seconds=60.0, budget_is_for="for the rounds of an image size")
    parser.add_argument("--compile", action=cli.BooleanFlag, help="also time forwards with compiled blocks")
    args = parser.parse_args(argv)
    for size in args.image_sizes:
        if size % LATENT_FACTOR:
            parser.error(f"--image-sizes must be divisible by {LATENT_FACTOR}, the side of a latent pixel, got {size}")
        for mediators in args.mediators:
            try:
                config_of(size, mediators)
            except ValueError as error:
                parser.error(f"--mediators {mediators} --image-sizes {size}: {error}")
    return args


def config_of(image_size: int, mediators: int | None) -> SiTConfig:
    return model_config(MODEL, input_size=image_size // LATENT_FACTOR, mediator_num=mediators)


# Forwards


class LinearsOnly(Attention):
    """Attention that computes q, k and v and projects v: no attention with these linears is faster."""

    def forward(self, x: Tensor, bias: None) -> Tensor:
        # One product for q, k and v, so that a compiler cannot leave out the unused ones; in two dimensions no slice is copied.
        B, N, D = x.shape
        return self.proj(self.qkv(x).flatten(0, 1)[:, 2 * D :]).view(B, N, D)


def with_linears_only(model: nn.Module) -> nn.Module:
    """A copy of a network with plain attention, reduced to :class:`LinearsOnly`."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.attn.__class__ = LinearsOnly
    return model


def forward_cases(args, image_size: int, device: torch.device) -> list[Case]:
    def network(mediators: int | None) -> nn.Module:
        input_size = image_size // LATENT_FACTOR
        return randomized(create_model(MODEL, input_size=input_size, mediator_num=mediators)).to(device).eval()

    plain = network(None)
    networks = {"plain": plain, "floor": with_linears_only(plain)}
    for mediators in args.mediators:
        own = network(mediators)
        networks |= {f"M = {mediators}": own, f"M = {mediators}, published": with_plain_attention(own)}
    inputs = random_inputs(plain.config, args.batch_size, device)
    dtype = torch.bfloat16 if args.precision == "bf16" else None
    cases = []
    for mode in modes(args):
        for name, built in networks.items():
            built = compiled(built) if mode else built
            baseline = None if name == "plain" else f"plain{mode}"
            cases.append(Case(name + mode, forward_call(built, inputs, dtype), args.batch_size, baseline))
    return cases


def floor_macs(config: SiTConfig) -> int:
    """Of a config with plain attention: without q k^T, and without probabilities times v."""
    return macs(config) - 2 * config.depth * config.width * config.grid**4


def forward_lines(args, image_size: int, results: dict[str, Result]) -> list[str]:
    """How many times as fast as plain attention each variant is, beside its target, and how much work it does."""
    config, lines = config_of(image_size, None), []
    for mode in modes(args):
        plain, floor = results[f"plain{mode}"], results[f"floor{mode}"]
        lines.append(
            f"- {image_size}, floor{mode}: {time_ratio(plain, floor):.2f} times as fast as plain; "
            f"{floor_macs(config) / 1e9:.2f} GMAC, plain {macs(config) / 1e9:.2f}"
        )
        for mediators in args.mediators:
            name = f"M = {mediators}"
            own, published = results[name + mode], results[f"{name}, published{mode}"]
            target = None if mode else TARGETS.get(image_size, {}).get(mediators)
            lines.append(
                f"- {image_size}, {name}{mode}: {time_ratio(plain, own):.2f} times as fast as plain"
                f"{'' if target is None else f' (target {target:g})'}, {time_ratio(floor, own):.2f} of the floor's speed, "
                f"{time_ratio(published, own):.2f} times as fast as published; "
                f"{macs(config_of(image_size, mediators)) / 1e9:.2f} GMAC"
            )
    return lines


def memory_line(args, name: str, results: dict[int, dict[str, Result]]) -> str:
    """Whether a variant's memory grows linearly in the number of tokens."""
    per_token = {
        size: by_name[name].peak_bytes / (args.batch_size * config_of(size, None).grid ** 2)
        for size, by_name in results.items()
    }
    sizes = ", ".join(f"{value:.0f} at {size}" for size, value in per_token.items())
    return f"- Peak bytes per token, {name}: {sizes} (alike where memory grows linearly)"


# SDE sampling


def no_noise(x: Tensor) -> Callable[[int], Tensor]:
    return lambda k: torch.zeros_like(x)


class CountedNetwork:
    """A network in closed form that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return 0.6 * x - 0.3 * (2 * x).cos() + 0.5 * t.view(-1, 1, 1, 1)


def sampling_calls() -> str:
    sampler = Sampler(create_transport())
    z = torch.randn(4, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    once, twice = CountedNetwork(), CountedNetwork()
    options = {**SDE_OPTIONS, "num_steps": SDE_POINTS}
    [ours] = sampler.sample_sde(step_noise=no_noise(z), **options)(z, once)
    published = sample_with_two_calls(sampler.sde(**options), z, twice)
    return (
        f"- SDE Euler, {SDE_POINTS} steps with the last: {once.calls} network calls, published {twice.calls}; "
        f"largest difference {(ours - published).abs().max():.1g} of values up to {published.abs().max():.1f}"
    )


def sampling_cases(args, device: torch.device) -> list[Case]:
    model = randomized(create_model(TINY_MODEL)).to(device).eval()
    z, _, y = random_inputs(model.config, args.batch_size, device)
    sampler, options = Sampler(create_transport()), {**SDE_OPTIONS, "num_steps": TIMED_SDE_POINTS}
    sample, sde = sampler.sample_sde(step_noise=no_noise(z), **options), sampler.sde(**options)
    once, twice = f"{TINY_MODEL}, {TIMED_SDE_POINTS} steps", f"{TINY_MODEL}, {TIMED_SDE_POINTS} steps, two calls"
    return [
        Case(twice, torch.inference_mode()(lambda: sample_with_two_calls(sde, z, model, y=y)), args.batch_size),
        Case(once, torch.inference_mode()(lambda: sample(z, model, y=y)), args.batch_size, twice),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = start().device
    forwards = {}
    for size in args.image_sizes:
        measured = measure(forward_cases(args, size, device), device=device, memory=True, **limits(args))
        forwards[size] = {result.name: result for result in measured}
    text = report(args, device, forwards, measure(sampling_cases(args, device), device=device, **limits(args)))
    print(text)
    write_section(f"benchmarks.mediators: {MODEL} on {device_name(device)}", text)


def report(args, device: torch.device, forwards: dict[int, dict[str, Result]], sampling: Sequence[Result]) -> str:
    rounds = ", ".join(f"{len(by_name['plain'].seconds)} at {size}" for size, by_name in forwards.items())
    what = f"""Medians of rounds of {args.precision} forwards with {args.batch_size} images ({rounds} pixels). {CAPTION}"""
    rows = [
        dataclasses.replace(result, name=f"{size}, {name}")
        for size, by_name in forwards.items()
        for name, result in by_name.items()
    ]
    lines = [line for size, by_name in forwards.items() for line in forward_lines(args, size, by_name)]
    compared = ["plain", *(f"M = {mediators}" for mediators in args.mediators)]
    lines += [memory_line(args, name + mode, forwards) for mode in modes(args) for name in compared]
    one = sampling[-1]
    lines += [sampling_calls(), f"- {one.name}: {one.ratio:.2f} of the time with two calls, {one.ms_per_item:.0f} ms/image"]
    return "\n\n".join((f"{environment(device)}.", textwrap.fill(what, 128), table(rows), "\n".join(lines)))


if __name__ == "__main__":
    cli.run(main)
