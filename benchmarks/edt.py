"""Time EDT's forward and its masked training step against plain formulations, and write the table to benchmarks/RESULTS.md.

python -m benchmarks.edt [--model EDT-S/2] [--batch-size 8] [--train-batch-size 4] [--threads 2] [--compile]
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks.products import record_products
from benchmarks.reference import with_plain_attention
from benchmarks.report import device_name, environment, table, write_section
from benchmarks.timing import Case, Result, measure, time_ratio
from diffusion import create_diffusion
from diffusion.timesteps import LossSecondMomentSampler
from models import create_model, model_names
from models.registry import default_amm
from runtime import cli
from runtime.distributed import start, start_training
from training.data import Batches, DataOrder
from training.ema import EMA
from training.optim import create_optimizer
from training.step import TrainingStep

SEED = 0
LEARNING_RATE = 1e-6  # the work is the same at any; a small one keeps the weights where they are


def parse(argv: Sequence[str] | None):
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--model", choices=[name for name in model_names() if name.startswith("EDT")], default="EDT-S/2")
    parser.add_argument("--batch-size", type=cli.positive_int, default=8, help="images in a forward")
    parser.add_argument("--train-batch-size", type=cli.positive_int, default=4, help="images in a training step, each twice")
    parser.add_argument("--train-precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=cli.positive_int, default=15, help="rounds in which every case is timed once")
    parser.add_argument("--warmup", type=cli.positive_int, default=2, help="rounds before them that do not count")
    parser.add_argument(
        "--budget-seconds",
        type=cli.positive_float,
        default=90.0,
        help="for the rounds of the forwards, and again for those of the training steps: none begins later",
    )
    parser.add_argument("--threads", type=cli.positive_int, help="of the CPU (default: as torch chooses)")
    parser.add_argument("--compile", action=cli.BooleanFlag, help="also time forwards with compiled blocks")
    return parser.parse_args(argv)


def randomized(model: nn.Module) -> nn.Module:
    """The model with N(0, 0.02) in place of the parameters that start as zeros, so that every block contributes."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def random_inputs(config, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(batch_size, config.in_channels, config.input_size, config.input_size, generator=generator)
    t = torch.randint(0, 1000, (batch_size,), generator=generator)
    y = torch.randint(0, config.num_classes, (batch_size,), generator=generator)
    return x.to(device), t.to(device), y.to(device)


def forward_call(model: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> Callable[[], Tensor]:
    """As in sampling. dtype: of autocast, which casts the weights at every call here; None: off."""
    device = inputs[0].device

    @torch.inference_mode()
    def call() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return model(*inputs)

    return call


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


def compiled(model: nn.Module) -> nn.Module:
    """A copy whose blocks are compiled, as training does it."""
    model = with_own_weights(model)
    for block in model.blocks:
        block.compile(dynamic=False)
    return model
